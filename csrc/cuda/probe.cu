// The smallest CUDA op: proves that the library compiles, links, loads beside a CUDA torch and runs on its stream.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One warp per row; lanes stride over the columns, then fold by shuffles: a fixed order, so two runs agree bitwise.
__global__ void row_sums(const float* x, int64_t rows, int64_t columns, float* out) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float sum = 0;
  for (int64_t j = lane; j < columns; j += 32) sum += x[row * columns + j];
  for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (lane == 0) out[row] = sum;
}

Tensor probe(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, "x: expected float32 [N, D]");
  const Tensor dense = torch::stable::contiguous(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows});
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  if (rows > 0) {
    const int64_t blocks = (rows + 3) / 4;
    row_sums<<<blocks, 128, 0, static_cast<cudaStream_t>(stream)>>>(dense.const_data_ptr<float>(), rows, columns,
                                                                    out.mutable_data_ptr<float>());
    STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "fastkd::probe: the launch failed");
  }
  return out;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("probe", TORCH_BOX(&fastkd::probe)); }
