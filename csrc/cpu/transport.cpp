// Problems over torch's own thread pool; the simplex is in csrc/transport_simplex.h.
#include <tuple>

#include "cpu/isa.h"
#include "cpu/tensors.h"
#include "transport.h"
#include "transport_warp.h"

FASTKD_DECLARE(TransportTable, transport);

namespace fastkd {
namespace {

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Problems per thread so that they are worth waking it for: about 16 microseconds.
int64_t problems_per_thread(int64_t cells) { return 1 + 768 / (cells > 0 ? cells : 1); }

// The CUDA kernel's 32 lanes, played by the host: what runs on a GPU can be tested without one.
template <class Cost>
void emulate(const TransportBatch& batch, int64_t begin, int64_t end) {
  using namespace transport;
  double cost[SIDE * SIDE];
  Workspace workspace;
  workspace.cost = cost;
  WarpLanes lanes;
  for (int64_t p = begin; p < end; ++p) solve<Cost>(lanes, workspace, batch, p);
}

Plan solve_batch(const Tensor& cost, const Tensor& a, const Tensor& b, const std::optional<Tensor>& start_v,
                 const TransportTable& solve) {
  const ScalarType type = cost.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "cost: expected float64 or float32");
  STD_TORCH_CHECK(a.scalar_type() == type && b.scalar_type() == type, "a, b: expected the dtype of cost");
  STD_TORCH_CHECK(cost.dim() == 3 && a.dim() == 2 && b.dim() == 2, "expected cost [P, N, M], a [P, N], b [P, M]");
  const int64_t problems = cost.size(0), n = cost.size(1), m = cost.size(2);
  STD_TORCH_CHECK(n >= 1 && n <= transport::SIDE && m >= 1 && m <= transport::SIDE, "cost: expected 1 <= N, M <= 64");
  STD_TORCH_CHECK(a.size(0) == problems && a.size(1) == n && b.size(0) == problems && b.size(1) == m,
                  "a, b: expected one mass per row and per column of cost");
  const Tensor c = torch::stable::contiguous(cost), rows = torch::stable::contiguous(a);
  const Tensor columns = torch::stable::contiguous(b);
  Tensor hint;
  if (start_v) {
    STD_TORCH_CHECK(start_v->scalar_type() == ScalarType::Double && start_v->numel() == problems * m,
                    "start_v: expected float64 [P, M]");
    hint = torch::stable::contiguous(*start_v);
  }
  Tensor flow = torch::stable::new_empty(c, {problems, n, m}, ScalarType::Double);
  Tensor u = torch::stable::new_empty(c, {problems, n}, ScalarType::Double);
  Tensor v = torch::stable::new_empty(c, {problems, m}, ScalarType::Double);
  Tensor status = torch::stable::new_empty(c, {problems}, ScalarType::Int);
  const TransportBatch batch{c.const_data_ptr(),
                             rows.const_data_ptr(),
                             columns.const_data_ptr(),
                             start_v ? hint.const_data_ptr<double>() : nullptr,
                             flow.mutable_data_ptr<double>(),
                             u.mutable_data_ptr<double>(),
                             v.mutable_data_ptr<double>(),
                             status.mutable_data_ptr<int32_t>(),
                             nullptr,
                             int(n),
                             int(m)};
  parallel_for(0, problems, problems_per_thread(n * m), [&](int64_t begin, int64_t end) {
    (type == ScalarType::Double ? solve.doubles : solve.floats)(batch, begin, end);
  });
  return {flow, u, v, status};
}

Plan transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, std::optional<Tensor> start_v) {
  return solve_batch(cost, a, b, start_v, FASTKD_CHOOSE(transport));
}

Plan transport_emulated(const Tensor& cost, const Tensor& a, const Tensor& b, std::optional<Tensor> start_v) {
  return solve_batch(cost, a, b, start_v, {emulate<double>, emulate<float>});
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("transport", TORCH_BOX(&fastkd::transport_plan));
  m.impl("transport_emulated", TORCH_BOX(&fastkd::transport_emulated));
}
