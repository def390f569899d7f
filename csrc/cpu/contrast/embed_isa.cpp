// The products of a projection with a few dozen examples: a library's GEMM packs operands that are read only twice
// here.
#include "cpu/contrast/embed.h"
#include "cpu/simd/isa.h"
#include "cpu/simd/vec.h"

namespace fastkd::contrast {

namespace {

#if defined(__AVX512F__)
constexpr int kX = 4, kW = 4, kRows = 8;
#else
constexpr int kX = 2, kW = 4, kRows = 4;
#endif
constexpr int kVectors = 2;
static_assert(kEmbedRows % kRows == 0 && kEmbedColumns % (kVectors * kLanes) == 0, "tiles are whole");

// Rows beyond the last are read from the last and not stored.
void dot_tile(const float* x, int64_t rows, const float* w, int64_t count, int64_t width, float* out, int64_t stride) {
  const float *of_x[kX], *of_w[kW];
  for (int i = 0; i < kX; ++i) of_x[i] = x + (i < rows ? i : rows - 1) * width;
  for (int j = 0; j < kW; ++j) of_w[j] = w + (j < count ? j : count - 1) * width;
  vfloat sum[kX][kW] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    vfloat right[kW];
#pragma GCC unroll 4
    for (int j = 0; j < kW; ++j) right[j] = load(of_w[j] + d);
#pragma GCC unroll 4
    for (int i = 0; i < kX; ++i) {
      const vfloat left = load(of_x[i] + d);
#pragma GCC unroll 4
      for (int j = 0; j < kW; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kX && i < rows; ++i)
    for (int j = 0; j < kW && j < count; ++j) {
      float total = sum_lanes(sum[i][j]);
      for (int64_t e = d; e < width; ++e) total += of_x[i][e] * of_w[j][e];
      out[i * stride + j] = total;
    }
}

void dot_products(const float* x, int64_t rows, const float* w, int64_t count, int64_t width, float* out,
                  int64_t stride) {
  for (int64_t j = 0; j < count; j += kW)
    for (int64_t i = 0; i < rows; i += kX)
      dot_tile(x + i * width, rows - i, w + j * width, count - j, width, out + i * stride + j, stride);
}

void outer_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k, float* out,
                int64_t out_stride) {
  vfloat sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < k; ++p, a += a_stride, b += b_stride) {
    vfloat right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += right[v] * a[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) store(out + i * out_stride + v * kLanes, sum[i][v]);
}

void outer_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k, int64_t m,
                    float* out, int64_t out_stride) {
  for (int64_t d = 0; d < kEmbedColumns; d += kVectors * kLanes)
    for (int64_t i = 0; i < m; i += kRows)
      outer_tile(a + i, a_stride, b + d, b_stride, k, out + i * out_stride + d, out_stride);
}

}  // namespace

const EmbedTable FASTKD_TABLE(embed_table) = {dot_products, outer_products};

}  // namespace fastkd::contrast
