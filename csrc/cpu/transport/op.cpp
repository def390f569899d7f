// Problems over torch's own thread pool; the simplex is in csrc/transport/simplex.h, that of large problems in
// network.h.
#include <string>

#include "transport/transport.h"

#include "cpu/runtime/tensors.h"
#include "cpu/simd/isa.h"
#include "transport/attention.h"
#include "transport/tensors.h"
#include "transport/warp.h"

namespace fastkd::transport {
namespace {

// Problems per thread so that they are worth waking it for: about 16 microseconds.
int64_t problems_per_thread(const Batch& batch) { return 1 + 768 / (batch.n * batch.m); }

Plan plan_by(const Table& table, const Tensor& cost, const Tensor& a, const Tensor& b,
             const std::optional<Tensor>& start_flow, const std::optional<Tensor>& start_v,
             const CostAttention& attention = {}, int64_t largest = LARGEST_ON_HOST) {
  const auto run = [&](const Batch& batch, int64_t problems, bool in_doubles) {
    const auto solve = in_doubles ? table.doubles : table.floats;
    if (attention.rows) return solve(batch, 0, problems);
    parallel_for(0, problems, problems_per_thread(batch),
                 [&](int64_t begin, int64_t end) { solve(batch, begin, end); });
  };
  return plan_of(cost, a, b, start_flow, start_v, run, attention, largest);
}

Plan transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, std::optional<Tensor> start_flow,
                    std::optional<Tensor> start_v) {
  return plan_by(chosen_table(), cost, a, b, start_flow, start_v);
}

// The CUDA kernel's 32 lanes, played by the host: what runs on a GPU can be tested without one.
template <class Cost>
void emulate(const Batch& batch, int64_t begin, int64_t end) {
  double cost[SIDE * SIDE];
  Workspace workspace;
  workspace.cost = cost;
  WarpLanes lanes;
  for (int64_t p = begin; p < end; ++p) solve<Cost>(lanes, workspace, batch, p);
  if (batch.attention.rows) move_weights<Cost>(lanes, batch, end);
}

Plan transport_emulated(const Tensor& cost, const Tensor& a, const Tensor& b, std::optional<Tensor> start_flow,
                        std::optional<Tensor> start_v) {
  return plan_by({emulate<double>, emulate<float>}, cost, a, b, start_flow, start_v, {}, SIDE);
}

Moved moved(const Table& table, const Tensor& cost, const Tensor& a, const Tensor& b, bool inverse_cost,
            double temperature, bool product_of_sums, bool joint, bool double_softmax,
            int64_t largest = LARGEST_ON_HOST) {
  const auto solve = [&](const CostAttention& how) { return plan_by(table, cost, a, b, {}, {}, how, largest); };
  return moved_by(a, b, inverse_cost, temperature, product_of_sums, joint, double_softmax, solve);
}

Moved cost_attention(const Tensor& cost, const Tensor& a, const Tensor& b, bool inverse_cost, double temperature,
                     bool product_of_sums, bool joint, bool double_softmax) {
  return moved(chosen_table(), cost, a, b, inverse_cost, temperature, product_of_sums, joint, double_softmax);
}

Moved cost_attention_emulated(const Tensor& cost, const Tensor& a, const Tensor& b, bool inverse_cost,
                              double temperature, bool product_of_sums, bool joint, bool double_softmax) {
  return moved({emulate<double>, emulate<float>}, cost, a, b, inverse_cost, temperature, product_of_sums, joint,
               double_softmax, SIDE);
}

}  // namespace
}  // namespace fastkd::transport

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // cost [P, N, M], a [P, N], b [P, M], a flow [P, N, M] and potentials of the columns [P, M] to
  // start from -> flow, u, v (float64), status.
  m.def(
      "transport(Tensor cost, Tensor a, Tensor b, Tensor? start_flow, Tensor? start_v) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // The same through the 32 lanes of the CUDA kernel, on the CPU; for tests.
  m.def(
      "transport_emulated(Tensor cost, Tensor a, Tensor b, Tensor? start_flow, Tensor? start_v) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  // Kinds of cost [P, N, M] between N and M layers of weights a [P, N], b [P, M]: their transport as above, and in the
  // same launch the weights that follow from it (float64).
  for (const char* name : {"cost_attention", "cost_attention_emulated"})
    m.def((std::string(name) +
           "(Tensor cost, Tensor a, Tensor b, bool inverse_cost, float temperature, bool product_of_sums, bool joint, "
           "bool double_softmax) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
              .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("transport", TORCH_BOX(&fastkd::transport::transport_plan));
  m.impl("transport_emulated", TORCH_BOX(&fastkd::transport::transport_emulated));
  m.impl("cost_attention", TORCH_BOX(&fastkd::transport::cost_attention));
  m.impl("cost_attention_emulated", TORCH_BOX(&fastkd::transport::cost_attention_emulated));
}
