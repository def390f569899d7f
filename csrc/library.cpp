// Every schema, once. Implementations register themselves beside their kernels: csrc/cpu/<stem>.cpp,
// csrc/cuda/<stem>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastkd, m) {
  // The sum of each row: the smallest op that walks the whole path from Python to a vector unit and back.
  m.def("probe(Tensor x) -> Tensor");

  // kind: position in fastkd.checks.KINDS. mix: weight of the student in the mixture of skew_kl and jsd.
  m.def("divergence_fwd(Tensor s, Tensor t, Tensor? mask, int kind, float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_bwd(Tensor grad, Tensor s, Tensor t, Tensor? mask, Tensor stats, int kind, float temperature, "
      "float mix) -> Tensor");
  // A sparse teacher; tail is the log-mass of the rest.
  m.def(
      "divergence_topk_fwd(Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, int kind, "
      "float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_topk_bwd(Tensor grad, Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, "
      "Tensor stats, int kind, float temperature, float mix) -> Tensor");

  // The mean squared difference of every student layer from every teacher layer, [N, M].
  m.def("layer_cost_fwd(Tensor[] students, Tensor[] teachers, Tensor? mask, float? clamp) -> Tensor");
  m.def("layer_cost_bwd(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor? mask, float? clamp) -> Tensor[]");
}
