#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::relation {

// A tile of scores is [keys][queries], rows `stride` apart: queries lie in the lanes, so nothing is summed across them.
// `queries` is filled up to a multiple of kRelationLanes; the results of the lanes beyond are never read.
constexpr int64_t kQueryLanes = 16;

struct Tile {
  float *s, *t;
  int64_t stride, keys, queries;
};

// Per query: a score of each side that is subtracted from all of its scores, at or near the largest; sum e^(t - max t),
// and sum e^(s - max s) less that. Where the sums are so different that their difference would lose digits, sum_t is
// negative, and `excess` is the student's sum itself.
struct Stats {
  float *max_t, *sum_t, *max_s, *excess;
};

// Per query, over the keys seen so far: sum e_t, e_s, e_s - e_t, e_t (expm1(c) - c), e_t c.
struct Sums {
  float *t, *s, *excess, *bregman, *cross;
};

// Per query, what makes g (q - p) of a pair of scores.
struct GradientFactors {
  float *max_t, *max_s, *p_scale, *q_scale, *kappa;
};

struct Table {
  // Scores of keys after the query, in the square at the diagonal, become so small that they count for nothing.
  void (*mask_future_keys)(const Tile& at);
  // `keep`: what `gradient_from_saved` needs replaces the scores.
  void (*statistics)(const Tile& at, bool keep, const Stats& of, float* values);
  // s = g (q - p), from what `statistics` saved, or from the scores again.
  void (*gradient_from_saved)(const Tile& at, const Stats& of, const float* g);
  void (*gradient_from_scores)(const Tile& at, const Stats& of, const float* g);
  // The same in parts, where scores are symmetric: a tile's queries (in the lanes) and its keys (the rows, all lanes of
  // which are valid) each add up their part. `values_from_sums` and `gradient_factors` take whole vectors of queries.
  void (*diagonal_scores)(const void* rows, int element, int64_t stride, int64_t count, int64_t width, float scale,
                          float* out);  // scale x . x
  void (*add_query_sums)(const Tile& at, const Stats& queries, const Sums& sums);
  void (*add_key_sums)(const Tile& at, const Stats& keys, const Sums& sums);
  void (*values_from_sums)(const Sums& sums, int64_t count, const Stats& of, float* values);
  void (*gradient_factors)(const Stats& of, const float* g, int64_t count, const GradientFactors& factors);
  void (*symmetric_gradient)(const Tile& at, const GradientFactors& queries,
                             const GradientFactors& keys);             // s = W + W^T
  void (*to_bfloat16)(const float* in, int64_t count, uint16_t* out);  // to bfloat16
  // out = by * in, both float32 or both bfloat16
  void (*scale)(const void* in, bool bfloat16, float by, int64_t count, void* out);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::relation
