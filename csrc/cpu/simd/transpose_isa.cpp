// Blocks of W by W in registers; the shuffles are gemm/pack.h's.
#include "cpu/simd/transpose.h"

#include "cpu/gemm/pack.h"
#include "cpu/simd/isa.h"

namespace fastkd {
namespace {

static_assert(kTransposeLanes % W == 0, "blocks must be whole vectors");

FASTKD_INLINE void load_block(const float* from, int64_t stride, Floats (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(from + i * stride);
}

FASTKD_INLINE void store_block(float* to, int64_t stride, const Floats (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * stride, x[i]);
}

void copy(const float* from, float* to, int64_t stride, int64_t size) {
  for (int64_t i = 0; i < size; i += W)
    for (int64_t j = 0; j < size; j += W) {
      Floats x[W];
      load_block(from + i * stride + j, stride, x);
      transpose(x);
      store_block(to + j * stride + i, stride, x);
    }
}

// f(x, y): the block of a, and the transposed block of b that belongs there.
template <class F>
FASTKD_INLINE void each_pair(float* a, float* b, int64_t stride, int64_t size, const F& f) {
  for (int64_t i = 0; i < size; i += W)
    for (int64_t j = a == b ? i : 0; j < size; j += W) {
      Floats x[W], y[W];
      load_block(b + j * stride + i, stride, y);
      transpose(y);
      load_block(a + i * stride + j, stride, x);
      f(x, y);
      store_block(a + i * stride + j, stride, y);
      transpose(x);
      store_block(b + j * stride + i, stride, x);
    }
}

void exchange(float* a, float* b, int64_t stride, int64_t size) {
  each_pair(a, b, stride, size, [](Floats(&)[W], Floats(&)[W]) {});
}

void symmetrise(float* a, float* b, int64_t stride, int64_t size) {
  each_pair(a, b, stride, size, [](Floats(&x)[W], Floats(&y)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i] = x[i] + y[i];
  });
}

}  // namespace

const TransposeTable FASTKD_TABLE(transpose_table) = {copy, exchange, symmetrise};

}  // namespace fastkd
