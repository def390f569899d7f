// What every CPU op needs around torch's stable ABI: short names, and the same words for the same mistakes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Rows per thread so that a thread's share is worth waking it for: about `elements` elements.
inline int64_t grain(int64_t row_length, int64_t elements = 32768) {
  return row_length >= elements ? 1 : (elements + row_length - 1) / (row_length > 0 ? row_length : 1);
}

// A large fresh output costs more in page faults than in arithmetic: ask for 2 MiB pages before it is first touched.
// Advice only; where the system grants none, nothing changes.
inline void use_huge_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kPage - 1) & ~(kPage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.numel() * x.element_size()) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The element types kernels read, as plain numbers that the instruction-set units understand without torch's headers.
enum Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "fastkd: the C++ kernels take float32, bfloat16 and float16");
  }
}

}  // namespace fastkd
