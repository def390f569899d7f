// How a register tile reaches C: the one place where alpha, accumulation and edges are dealt with.
#pragma once
#include "cpu/gemm/pack.h"

namespace fastkd {
namespace {

// Where a register tile goes: rows and columns that exist, and how.
struct Corner {
  float* c;
  int64_t row_stride, rows, columns;
  float alpha;
  bool accumulate;
};

// One rounding for the product with alpha and one for the sum, in every kernel and at every edge: a compiler that fuses
// them here and not there would break the bitwise promise.
FASTKD_INLINE vfloat rounded(vfloat x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

FASTKD_INLINE void write_vector(float* c, vfloat sum, const Corner& at) {
  const vfloat scaled = rounded(sum * at.alpha);
  store(c, at.accumulate ? load(c) + scaled : scaled);
}

// sums[rows][sums_stride], of which the rows and columns of the corner are wanted; its last columns may be missing a
// part of a vector in C, not in sums.
void write_sums(const float* sums, int64_t sums_stride, const Corner& at) {
  for (int64_t i = 0; i < at.rows; ++i) {
    for (int64_t j = 0; j < at.columns; j += kLanes) {
      float* c = at.c + i * at.row_stride + j;
      const vfloat sum = load(sums + i * sums_stride + j);
      if (at.columns - j >= kLanes) {
        write_vector(c, sum, at);
        continue;
      }
      float edge[kLanes] = {};
      const int64_t bytes = (at.columns - j) * 4;
      if (at.accumulate) std::memcpy(edge, c, bytes);
      write_vector(edge, sum, at);
      std::memcpy(c, edge, bytes);
    }
  }
}

}  // namespace
}  // namespace fastkd
