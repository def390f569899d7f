// What every CPU op needs around torch's stable ABI: short names, and one wording for each mistake.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

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

// What a tensor argument may consist of.
enum Dtypes : unsigned { kF32 = 1, kBF16 = 2, kF16 = 4, kF64 = 8, kF8 = 16, kI64 = 32, kBool = 64 };
constexpr unsigned kFloating = kF32 | kBF16 | kF16;

inline unsigned dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kF32;
    case ScalarType::BFloat16:
      return kBF16;
    case ScalarType::Half:
      return kF16;
    case ScalarType::Double:
      return kF64;
    case ScalarType::Float8_e4m3fn:
      return kF8;
    case ScalarType::Long:
      return kI64;
    case ScalarType::Bool:
      return kBool;
    default:
      return 0;
  }
}

constexpr int64_t kAny = -1;  // a size that is not prescribed
using Sizes = std::initializer_list<int64_t>;

// Checks the arguments of an op before any memory is read: an error raised inside parallel_for loses its message.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // Throws unless x is on the CPU, of one of `dtypes` and of `sizes`; `layout` is how the documentation writes these.
  void operator()(const char* name, const Tensor& x, unsigned dtypes, const char* layout, Sizes sizes,
                  int64_t place = kAny) const {
    bool fits = x.is_cpu() && (dtype_of(x) & dtypes) && x.dim() == int64_t(sizes.size());
    if (fits && sizes.size()) {
      const auto own = x.sizes();
      size_t axis = 0;
      for (const int64_t size : sizes) fits &= size == kAny || size == own[axis], ++axis;
    }
    if (!fits) refuse(name, x, dtypes, layout, std::vector<int64_t>(sizes), place);
  }
  void operator()(const char* name, const std::optional<Tensor>& x, unsigned dtypes, const char* layout,
                  Sizes sizes) const {
    if (x) (*this)(name, *x, dtypes, layout, sizes);
  }
  void operator()(const char* name, const std::vector<Tensor>& xs, unsigned dtypes, const char* layout,
                  Sizes sizes) const {
    for (size_t i = 0; i < xs.size(); ++i) (*this)(name, xs[i], dtypes, layout, sizes, int64_t(i));
  }

  // Of the sizes of another tensor, however many.
  void like(const char* name, const Tensor& x, unsigned dtypes, const Tensor& other, int64_t place = kAny) const {
    const auto own = x.sizes(), wanted = other.sizes();
    const bool same =
        std::equal(own.begin(), own.end(), wanted.begin(), wanted.end());  // torch 2.10 has no == of sizes
    if (!x.is_cpu() || !(dtype_of(x) & dtypes) || !same)
      refuse(name, x, dtypes, "[...]", {wanted.begin(), wanted.end()}, place);
  }

  // A list's length; kAny: one entry at least.
  template <class T>
  void length(const char* name, const std::vector<T>& xs, int64_t expected) const {
    const auto came = int64_t(xs.size());
    STD_TORCH_CHECK(expected == kAny ? came > 0 : came == expected, op_, ": ", name, ": expected a list of ",
                    expected == kAny ? "at least 1" : std::to_string(expected), ", got ", came);
  }
  // Any other rule, as a sentence.
  template <class T>
  void that(bool holds, const char* name, const char* expected, const T& came) const {
    STD_TORCH_CHECK(holds, op_, ": ", name, ": expected ", expected, ", got ", came);
  }
  // What is written to where it lies.
  void contiguous(const char* name, const Tensor& x) const {
    that(x.is_contiguous(), name, "a contiguous tensor", "one with gaps");
  }
  void together(const char* names, bool one, bool other) const {
    that(one == other, names, "both or neither", "one of them");
  }

 private:
  const char* op_;

  [[noreturn, gnu::cold, gnu::noinline]] void refuse(const char* name, const Tensor& x, unsigned dtypes,
                                                     const char* layout, std::vector<int64_t> sizes,
                                                     int64_t place) const {
    static constexpr const char* kNames[] = {"float32",       "bfloat16", "float16", "float64",
                                             "float8_e4m3fn", "int64",    "bool"};
    std::string expected, wanted, came = "another dtype";
    for (int bit = 0; bit < 7; ++bit) {
      if (dtypes >> bit & 1) expected += std::string(expected.empty() ? "" : " or ") + kNames[bit];
      if (dtype_of(x) >> bit & 1) came = kNames[bit];
    }
    for (const int64_t size : sizes)
      wanted += (wanted.empty() ? "" : ", ") + (size == kAny ? "*" : std::to_string(size));
    came += " [";
    for (int64_t axis = 0; axis < x.dim(); ++axis) came += (axis ? ", " : "") + std::to_string(x.size(axis));
    STD_TORCH_CHECK(false, op_, ": ", name, place == kAny ? "" : "[" + std::to_string(place) + "]", ": expected ",
                    expected, " ", layout, " = [", wanted, "] on the CPU, got ", came,
                    x.is_cpu() ? "]" : "] elsewhere");
  }
};

// x, or a copy whose elements lie side by side.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

}  // namespace fastkd
