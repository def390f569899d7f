// What is not a torch op: build information. Compiled against pybind11 as torch ships it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastkd: what is not a torch op";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["built_against_torch"] = FASTKD_TORCH_VERSION;
    info["instruction_sets"] = FASTKD_INSTRUCTION_SETS;
    return info;
  });
}
