// One warp, one block, one problem; costs, potentials and the tree live in shared memory. The simplex is in
// csrc/transport/simplex.h and its lanes in csrc/transport/warp.h, whose host side the CPU tests run.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "transport/attention.h"
#include "transport/tensors.h"
#include "transport/warp.h"

namespace fastkd::transport {
namespace {

using torch::stable::Tensor;

template <class Cost>
__global__ void __launch_bounds__(32) transport_kernel(const Batch batch) {
  extern __shared__ double cost[];  // [n, m]
  __shared__ Workspace workspace;
  if (threadIdx.x == 0) workspace.cost = cost;
  WarpLanes lanes;
  solve<Cost>(lanes, workspace, batch, blockIdx.x);
}

// All kinds of cost one after the other, then the weights that follow from them: one warp, one launch.
template <class Cost>
__global__ void __launch_bounds__(32) cost_attention_kernel(const Batch batch, int problems) {
  extern __shared__ double cost[];  // [n, m]
  __shared__ Workspace workspace;
  if (threadIdx.x == 0) workspace.cost = cost;
  WarpLanes lanes;
  for (int p = 0; p < problems; ++p) solve<Cost>(lanes, workspace, batch, p);
  move_weights<Cost>(lanes, batch, problems);
}

Plan plan_of(const Tensor& cost, const Tensor& a, const Tensor& b, const std::optional<Tensor>& start_flow,
             const std::optional<Tensor>& start_v, const CostAttention& attention) {
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(cost.get_device_index(), &stream));
  const auto launch = [&](const Batch& batch, int64_t problems, bool in_doubles) {
    STD_TORCH_CHECK(problems <= INT32_MAX, "cost: more than 2^31 - 1 problems");
    // At most 32 KiB of costs beside the 5.6 KiB workspace: within the 48 KiB that every chip grants unasked.
    const auto kernel = in_doubles ? transport_kernel<double> : transport_kernel<float>;
    const size_t bytes = sizeof(double) * size_t(batch.n) * size_t(batch.m);
    if (attention.rows) {
      const auto kernel = in_doubles ? cost_attention_kernel<double> : cost_attention_kernel<float>;
      kernel<<<1, 32, bytes, static_cast<cudaStream_t>(stream)>>>(batch, int(problems));
      STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "fastkd::cost_attention: the launch failed");
      return;
    }
    kernel<<<unsigned(problems), 32, bytes, static_cast<cudaStream_t>(stream)>>>(batch);
    STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "fastkd::transport: the launch failed");
  };
  return plan_of(cost, a, b, start_flow, start_v, launch, attention);
}

Plan transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, std::optional<Tensor> start_flow,
                    std::optional<Tensor> start_v) {
  return plan_of(cost, a, b, start_flow, start_v, {});
}

Moved cost_attention(const Tensor& cost, const Tensor& a, const Tensor& b, bool inverse_cost, double temperature,
                     bool product_of_sums, bool joint, bool double_softmax) {
  const auto solve = [&](const CostAttention& how) { return plan_of(cost, a, b, {}, {}, how); };
  return moved_by(a, b, inverse_cost, temperature, product_of_sums, joint, double_softmax, solve);
}

}  // namespace
}  // namespace fastkd::transport

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("transport", TORCH_BOX(&fastkd::transport::transport_plan));
  m.impl("cost_attention", TORCH_BOX(&fastkd::transport::cost_attention));
}
