#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::gram {

// A row of a side: `count` is a multiple of kGramLanes wherever it is not said otherwise; rows are filled up with
// zeros.
constexpr int64_t kGramLanes = 16;  // a multiple of every instruction set's vector

inline int64_t gram_padded(int64_t count) { return (count + kGramLanes - 1) / kGramLanes * kGramLanes; }

// What turns dL/du of a row into dL/dx, x the row as it was given.
struct RowGradient {
  const void* row;      // u - centre in float32 or, `raw`, x in bfloat16
  const float* centre;  // null where raw
  bool raw, project;    // project: u = x / |x|; else u = scale * x with a constant scale
  float scale, sum;     // of the row of weights
};

// What dL is to the entries of row i, with p = P[i, j] - mean_p[i] and q = Q[i, j] - mean_q[i]:
//
//     W[i, j] = of_q[i] (q - (high[i] + low[i]) p + rest[i])
//
// the component of q orthogonal to p. Where it is nearly 0, its digits come from `low` and from `rest`, which is what
// the means lost when they were rounded.
struct RowWeights {
  float *of_q, *high, *low, *rest, *mean_p, *mean_q;
  RowWeights from(int64_t i) const { return {of_q + i, high + i, low + i, rest + i, mean_p + i, mean_q + i}; }
};

// Of some entries of P and Q: their number, their means, and the sums of products of what is left without the means.
struct Moments {
  double count, mean_p, mean_q, pp, qq, pq;
};

struct Table {
  // `count` (any) elements to `out` as they are (raw) or as floats. `element`: cpu/runtime/tensors.h.
  void (*copy_row)(const void* row, int element, bool raw, int64_t count, void* out);
  // Returns the sum of squares; copies too, unless `out` is null.
  double (*squared_norm)(const void* row, int element, bool raw, int64_t count, void* out);
  void (*add_scaled_row)(const void* row, bool raw, float scale, int64_t count, float* sums);
  // out = scale * row - centre; returns <out, centre>, or (square) <out, out>.
  double (*centre_row)(const float* row, float scale, const float* centre, bool square, int64_t count, float* out);
  // tile = tile * scale_i * scale_j + offset_i + offset_j, then zeros from `columns` (any) to the next multiple.
  void (*scale_and_offset)(float* tile, int64_t stride, int64_t rows, int64_t columns, const float* scale_i,
                           const float* scale_j, const float* offset_i, const float* offset_j);
  // Adds sum p p, sum q q and sum p q over a tile; columns from `once` on count twice.
  void (*add_moments)(const float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, int64_t once,
                      double* sums);
  Moments (*row_moments)(const float* p, const float* q, int64_t columns);  // any number of columns
  // p = W[i, j] + W[j, i], then zeros from `columns` (any) to the next multiple; p and q are symmetric.
  void (*symmetric_weights)(float* p, const float* q, int64_t stride, int64_t rows, int64_t columns,
                            const RowWeights& i, const RowWeights& j);
  // The sum of a row, whose elements are then multiplied by `scale` unless that is null.
  double (*sum_and_scale)(float* row, int64_t count, const float* scale);
  // `product` holds the weighted sum of the other rows; `out` (which may be `product`) becomes the gradient, plus
  // `before` unless that is null. `scratch`: count floats.
  void (*input_gradient)(const RowGradient& of, int64_t count, float* product, float* scratch, const float* before,
                         float* out);
  void (*add_to_float64)(const float* from, int64_t count, double* into);        // any count
  void (*to_float32)(const void* in, int element, int64_t count, float* out);    // any count
  void (*from_float32)(const float* in, int element, int64_t count, void* out);  // any count
  // The sum of by[k] times row k of `count` (any) elements, float32 or bfloat16, to an element type of its own; `sum`
  // is scratch for gram_padded(count) floats.
  void (*weighted_sum)(const void* const* rows, int element, const float* by, int64_t terms, int64_t count, float* sum,
                       int element_out, void* out);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::gram
