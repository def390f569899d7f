// One warp, one block, one problem; costs, potentials and the tree live in shared memory. The simplex is in
// csrc/transport_simplex.h and its lanes in csrc/transport_warp.h, whose host side the CPU tests run.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "transport_tensors.h"
#include "transport_warp.h"

namespace fastkd {
namespace {

using torch::stable::Tensor;

template <class Cost>
__global__ void __launch_bounds__(32) transport_kernel(const TransportBatch batch) {
  extern __shared__ double cost[];  // [n, m]
  __shared__ transport::Workspace workspace;
  if (threadIdx.x == 0) workspace.cost = cost;
  transport::WarpLanes lanes;
  transport::solve<Cost>(lanes, workspace, batch, blockIdx.x);
}

transport::Plan transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, std::optional<Tensor> start_flow,
                               std::optional<Tensor> start_v) {
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(cost.get_device_index(), &stream));
  const auto launch = [&](const TransportBatch& batch, int64_t problems, bool in_doubles) {
    STD_TORCH_CHECK(problems <= INT32_MAX, "cost: more than 2^31 - 1 problems");
    // At most 32 KiB of costs beside the 5.6 KiB workspace: within the 48 KiB that every chip grants unasked.
    const auto kernel = in_doubles ? transport_kernel<double> : transport_kernel<float>;
    const size_t bytes = sizeof(double) * size_t(batch.n) * size_t(batch.m);
    kernel<<<unsigned(problems), 32, bytes, static_cast<cudaStream_t>(stream)>>>(batch);
    STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "fastkd::transport: the launch failed");
  };
  return transport::plan_of(cost, a, b, start_flow, start_v, launch);
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("transport", TORCH_BOX(&fastkd::transport_plan)); }
