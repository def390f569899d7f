#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd {

// Transposition of float32 matrices. `stride`, `from_stride`, `to_stride`: elements between rows.
constexpr int64_t kTransposeLanes = 16;  // a multiple of every instruction set's vector

struct TransposeTable {
  // to [columns][to_stride] = from [rows][from_stride]^T. Whole vectors are read and written: a row of `from` has room
  // for the next multiple of kTransposeLanes of columns, and a row of `to` for that of rows.
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                    int64_t to_stride);
  // Of square blocks, whose `size` is a multiple of kTransposeLanes; a may be b.
  void (*exchange)(float* a, float* b, int64_t stride, int64_t size);    // a, b = b^T, a^T
  void (*symmetrise)(float* a, float* b, int64_t stride, int64_t size);  // a += b^T, b = a^T
};

FASTKD_DECLARE_TABLE(TransposeTable, transpose_table);

}  // namespace fastkd
