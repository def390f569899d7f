// Elementwise work on logits and gradients, while a piece of a row is in the cache.
#include "cpu/linear_divergence/op.h"

#include "cpu/simd/isa.h"
#include "cpu/simd/vec.h"

namespace fastkd::linear_divergence {

namespace {

// f(x, i) on vectors of x at i, stored back into x.
template <class F>
inline void update(float* x, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, f(load(x + i), i, kLanes));
  if (i < count) store_some(x + i, f(load_some(x + i, int(count - i), 0), i, int(count - i)), int(count - i));
}

inline vfloat some(const float* x, int count) { return count == kLanes ? load(x) : load_some(x, count, 0); }

inline vfloat tanh(vfloat x) {  // from expm1, which keeps the digits of a small x
  const vfloat rise = exponential(magnitude(x) * -2.f).expm1(), size = -rise / (2.f + rise);
  return x < 0.f ? -size : size;
}

void scale_and_cap(float* x, const float* bias, float scale, float cap, int64_t count) {
  if (bias) update(x, count, [&](vfloat a, int64_t i, int n) { return a + some(bias + i, n); });
  if (cap == 0 && scale == 1) return;
  const float inverse = cap == 0 ? 1 : 1 / cap;
  update(x, count, [&](vfloat a, int64_t, int) {
    a *= scale;
    return cap == 0 ? a : cap * tanh(a * inverse);
  });
}

void scale_and_cap_gradient(float* grad, const float* changes_logits, float scale, float cap, int64_t count) {
  const float inverse = cap == 0 ? 0 : 1 / cap;
  update(grad, count, [&](vfloat g, int64_t i, int n) {
    const vfloat y = cap == 0 ? vfloat{} : some(changes_logits + i, n) * inverse;
    return g * (scale * ((1.f - y) * (1.f + y)));
  });
}

void add_softmax(float* grad, const float* x, float log_sum, float scale, int64_t count) {
  update(grad, count, [&](vfloat g, int64_t i, int n) { return g + exp(some(x + i, n) - log_sum) * scale; });
}

void add_row(float* sum, const float* x, int64_t count) {
  update(sum, count, [&](vfloat a, int64_t i, int n) { return a + some(x + i, n); });
}

void scale_row(const void* in, int in_element, float factor, void* out, int element, int64_t count) {
  constexpr int64_t kPiece = 512;
  float piece[kPiece], wide[kPiece];
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t n = count - begin < kPiece ? count - begin : kPiece;
    const void* at = static_cast<const char*>(in) + begin * (in_element ? 2 : 4);
    const float* from = as_floats(at, in_element, wide, n);
    float* to = element == 0 ? static_cast<float*>(out) + begin : piece;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
    if (element) (element == 1 ? narrow_bfloat16 : narrow_float16)(piece, static_cast<uint16_t*>(out) + begin, n);
  }
}

}  // namespace

const Table FASTKD_TABLE(table) = {scale_and_cap, scale_and_cap_gradient, add_softmax, add_row, scale_row};

}  // namespace fastkd::linear_divergence
