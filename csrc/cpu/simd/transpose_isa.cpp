// Blocks of kLanes by kLanes in registers; the shuffles are gemm/pack.h's.
#include "cpu/simd/transpose.h"

#include "cpu/gemm/pack.h"
#include "cpu/simd/isa.h"

namespace fastkd {
namespace {

static_assert(kTransposeLanes % kLanes == 0, "blocks must be whole vectors");

FASTKD_INLINE void load_block(const float* from, int64_t stride, vfloat (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = load(from + i * stride);
}

FASTKD_INLINE void store_block(float* to, int64_t stride, const vfloat (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * stride, x[i]);
}

void transpose_matrix(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      vfloat x[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) x[k] = load(from + (i + k < rows ? i + k : rows - 1) * from_stride + j);
      transpose(x);
      const int64_t count = columns - j < kLanes ? columns - j : kLanes;
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k)
        if (k < count) store(to + (j + k) * to_stride + i, x[k]);
    }
}

// f(x, y): the block of a, and the transposed block of b that belongs there.
template <class F>
FASTKD_INLINE void each_pair(float* a, float* b, int64_t stride, int64_t size, const F& f) {
  for (int64_t i = 0; i < size; i += kLanes)
    for (int64_t j = a == b ? i : 0; j < size; j += kLanes) {
      vfloat x[kLanes], y[kLanes];
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
  each_pair(a, b, stride, size, [](vfloat(&)[kLanes], vfloat(&)[kLanes]) {});
}

void symmetrise(float* a, float* b, int64_t stride, int64_t size) {
  each_pair(a, b, stride, size, [](vfloat(&x)[kLanes], vfloat(&y)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i] = x[i] + y[i];
  });
}

}  // namespace

const TransposeTable FASTKD_TABLE(transpose_table) = {transpose_matrix, exchange, symmetrise};

}  // namespace fastkd
