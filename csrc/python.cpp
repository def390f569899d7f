// What is not a torch op: build information, and the transport solver for NumPy. Compiled against pybind11 as torch
// ships it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/simd/isa.h"
#include "transport/transport.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

// One problem: (flow, u, v, status, pivots).
py::tuple emd(const Array& a, const Array& b, const Array& cost) {
  if (cost.ndim() != 2 || a.ndim() != 1 || b.ndim() != 1)
    throw py::value_error("expected a [N], b [M] and a cost matrix M [N, M]");
  const py::ssize_t n = cost.shape(0), m = cost.shape(1);
  if (a.shape(0) != n || b.shape(0) != m)
    throw py::value_error("M: expected one row per mass of a and one column per mass of b, got " + std::to_string(n) +
                          " x " + std::to_string(m) + " for " + std::to_string(a.shape(0)) + " and " +
                          std::to_string(b.shape(0)) + " masses");
  constexpr int largest = fastkd::transport::LARGEST_ON_HOST;
  if (n < 1 || m < 1 || n > largest || m > largest)
    throw py::value_error("M: the exact solver takes 1 to " + std::to_string(largest) + " rows and columns");
  py::array_t<double> flow({n, m}), u(n), v(m);
  int32_t status = 0, pivots = 0;
  const fastkd::transport::Batch problem{
      cost.data(),      a.data(),         b.data(), nullptr, nullptr, flow.mutable_data(),
      u.mutable_data(), v.mutable_data(), &status,  &pivots, int(n),  int(m)};
  fastkd::transport::chosen_table().doubles(problem, 0, 1);
  return py::make_tuple(flow, u, v, status, pivots);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastkd: what is not a torch op";
  m.def("emd", &emd, py::arg("a"), py::arg("b"), py::arg("M"));
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["built_against_torch"] = FASTKD_TORCH_VERSION;
    info["instruction_sets"] = FASTKD_INSTRUCTION_SETS;
    return info;
  });
}
