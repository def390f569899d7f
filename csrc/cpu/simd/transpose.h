#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd {

// Transposition of square blocks of float32; `size` is a multiple of kTurnLanes, rows of both lie `stride` apart.
constexpr int64_t kTransposeLanes = 16;

struct TransposeTable {
  void (*copy)(const float* from, float* to, int64_t stride, int64_t size);  // to = from^T
  void (*exchange)(float* a, float* b, int64_t stride, int64_t size);        // a, b = b^T, a^T; a may be b
  void (*symmetrise)(float* a, float* b, int64_t stride, int64_t size);      // a += b^T, b = a^T; a may be b
};

FASTKD_DECLARE_TABLE(TransposeTable, transpose_table);

}  // namespace fastkd
