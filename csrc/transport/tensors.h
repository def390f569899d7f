// From tensors to a Batch and back, the same for the CPU op and the CUDA op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "transport/simplex.h"

namespace fastkd::transport {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // flow, u, v, status

inline Tensor hint(const char* expected, const std::optional<Tensor>& x, int64_t elements) {
  if (!x) return Tensor();
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Double && x->numel() == elements, expected);
  return torch::stable::contiguous(*x);
}

// run(batch, problems, in_doubles) solves them all. `attention`: where to leave the weights' move, if that is wanted.
// `largest`: most rows and most columns.
template <class Run>
Plan plan_of(const Tensor& cost, const Tensor& a, const Tensor& b, const std::optional<Tensor>& start_flow,
             const std::optional<Tensor>& start_v, Run run, const CostAttention& attention = {},
             int64_t largest = SIDE) {
  const ScalarType type = cost.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "cost: expected float64 or float32");
  STD_TORCH_CHECK(a.scalar_type() == type && b.scalar_type() == type, "a, b: expected the dtype of cost");
  STD_TORCH_CHECK(cost.dim() == 3 && a.dim() == 2 && b.dim() == 2,
                  "cost, a, b: expected [P, N, M], [P, N] and [P, M], got ", cost.dim(), ", ", a.dim(), " and ",
                  b.dim(), " axes");
  const int64_t problems = cost.size(0), n = cost.size(1), m = cost.size(2);
  STD_TORCH_CHECK(n >= 1 && n <= largest && m >= 1 && m <= largest, "cost: expected 1 to ", largest,
                  " rows and columns, got ", n, " x ", m);
  STD_TORCH_CHECK(a.size(0) == problems && a.size(1) == n && b.size(0) == problems && b.size(1) == m,
                  "a, b: expected one mass per row and per column of cost");
  const Tensor costs = torch::stable::contiguous(cost);
  const Tensor rows = torch::stable::contiguous(a), columns = torch::stable::contiguous(b);
  const Tensor flow_hint = hint("start_flow: expected float64 [P, N, M]", start_flow, problems * n * m);
  const Tensor v_hint = hint("start_v: expected float64 [P, M]", start_v, problems * m);
  Tensor flow = torch::stable::new_empty(costs, {problems, n, m}, ScalarType::Double);
  Tensor u = torch::stable::new_empty(costs, {problems, n}, ScalarType::Double);
  Tensor v = torch::stable::new_empty(costs, {problems, m}, ScalarType::Double);
  Tensor status = torch::stable::new_empty(costs, {problems}, ScalarType::Int);
  Batch batch{};
  batch.cost = costs.const_data_ptr(), batch.a = rows.const_data_ptr(), batch.b = columns.const_data_ptr();
  batch.start_flow = start_flow ? flow_hint.const_data_ptr<double>() : nullptr;
  batch.start_v = start_v ? v_hint.const_data_ptr<double>() : nullptr;
  batch.flow = flow.mutable_data_ptr<double>();
  batch.u = u.mutable_data_ptr<double>(), batch.v = v.mutable_data_ptr<double>();
  batch.status = status.mutable_data_ptr<int32_t>();
  batch.n = int(n), batch.m = int(m);
  batch.attention = attention;
  if (problems > 0) run(batch, problems, type == ScalarType::Double);
  return {flow, u, v, status};
}

using Moved =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // a plan, and the weights of rows and columns

// solve(attention): the plan of all problems in one run.
template <class Solve>
Moved moved_by(const Tensor& a, const Tensor& b, bool inverse_cost, double temperature, bool product_of_sums,
               bool joint, bool double_softmax, Solve solve) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a, b: expected [P, N] and [P, M], got ", a.dim(), " and ", b.dim(),
                  " axes");
  Tensor rows = torch::stable::new_empty(a, {a.size(0), a.size(1)}, ScalarType::Double);
  Tensor columns = torch::stable::new_empty(b, {b.size(0), b.size(1)}, ScalarType::Double);
  const auto [flow, u, v, status] =
      solve(CostAttention{rows.mutable_data_ptr<double>(), columns.mutable_data_ptr<double>(), temperature,
                          inverse_cost, product_of_sums, joint, double_softmax});
  return {flow, u, v, status, rows, columns};
}

}  // namespace
}  // namespace fastkd::transport
