#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::contrast {

constexpr int64_t kEmbedRows = 8;      // of a register tile
constexpr int64_t kEmbedColumns = 32;  // likewise

// The two products of a linear map with few examples, both operands where they lie.
struct EmbedTable {
  // out [rows of x][stride] at columns 0 .. count - 1: <x_i, w_j>; x and w are row-major, `width` floats a row.
  void (*dot_products)(const float* x, int64_t rows, const float* w, int64_t count, int64_t width, float* out,
                       int64_t stride);
  // out [m][kEmbedColumns] = sum_k a[k][m] b[k][kEmbedColumns]; m in steps of kEmbedRows.
  void (*outer_products)(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k, int64_t m,
                         float* out, int64_t out_stride);
};

FASTKD_DECLARE_TABLE(EmbedTable, embed_table);

}  // namespace fastkd::contrast
