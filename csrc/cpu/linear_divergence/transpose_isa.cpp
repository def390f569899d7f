// Transposition of a tile of logits, in blocks of W by W in registers; the shuffles are gemm/pack.h's.
#include "cpu/gemm/pack.h"
#include "cpu/linear_divergence/op.h"
#include "cpu/simd/isa.h"

namespace fastkd::linear_divergence {

namespace {

void turn(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += W)
    for (int64_t i = 0; i < rows; i += W) {
      Floats x[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) x[k] = load(from + (i + k < rows ? i + k : rows - 1) * from_stride + j);
      transpose(x);
      const int64_t there = columns - j < W ? columns - j : W;
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k)
        if (k < there) store(to + (j + k) * to_stride + i, x[k]);
    }
}

}  // namespace

const TransposeTable FASTKD_TABLE(transpose_table) = {turn};

}  // namespace fastkd::linear_divergence
