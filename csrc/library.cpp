// Every schema, once. Implementations register themselves beside their kernels: csrc/cpu/<stem>.cpp, csrc/cuda/<stem>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastkd, m) {
  // The sum of each row: the smallest op that walks the whole path from Python to a vector unit and back.
  m.def("probe(Tensor x) -> Tensor");
}
