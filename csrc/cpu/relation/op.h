#pragma once
#include <cstdint>

// A tile of scores is [keys][queries], rows `stride` apart: queries lie in the lanes, so nothing is summed across them.
// `queries` is filled up to a multiple of kRelationLanes; what comes out of the lanes beyond is never looked at.
constexpr int64_t kRelationLanes = 16;

struct RelationTile {
  float *s, *t;
  int64_t stride, keys, queries;
};

// Per query: a score of each side that is taken off all of its scores, at or near the largest; sum e^(t - max t), and
// sum e^(s - max s) less that. Where the sums are so far apart that their difference would lose digits, sum_t is
// negative, and `excess` is the student's sum itself.
struct RelationStats {
  float *max_t, *sum_t, *max_s, *excess;
};

// Per query, over the keys seen so far: sum e_t, e_s, e_s - e_t, e_t (expm1(c) - c), e_t c.
struct RelationSums {
  float *t, *s, *excess, *bregman, *cross;
};

// Per query, what makes g (q - p) of a pair of scores.
struct RelationPull {
  float *max_t, *max_s, *p_scale, *q_scale, *kappa;
};

struct RelationTable {
  // Scores of keys after the query, in the square at the diagonal, become so small that they count for nothing.
  void (*hide)(const RelationTile& at);
  // `keep`: what `from_kept` needs is left where the scores were.
  void (*statistics)(const RelationTile& at, bool keep, const RelationStats& of, float* values);
  // s = g (q - p), from what `statistics` kept, or from scores once more.
  void (*from_kept)(const RelationTile& at, const RelationStats& of, const float* g);
  void (*from_scores)(const RelationTile& at, const RelationStats& of, const float* g);
  // The same in parts, where scores are symmetric: a tile's queries (in the lanes) and its keys (the rows, all lanes of
  // which count) each get what the other is to them. `finish` takes whole vectors of queries, as does `prepare`.
  void (*own_scores)(const void* rows, int element, int64_t stride, int64_t count, int64_t width, float scale,
                     float* out);  // scale x . x
  void (*down)(const RelationTile& at, const RelationStats& queries, const RelationSums& sums);
  void (*across)(const RelationTile& at, const RelationStats& keys, const RelationSums& sums);
  void (*finish)(const RelationSums& sums, int64_t count, const RelationStats& of, float* values);
  void (*prepare)(const RelationStats& of, const float* g, int64_t count, const RelationPull& pull);
  void (*both)(const RelationTile& at, const RelationPull& queries, const RelationPull& keys);  // s = W + W^T
  void (*narrow)(const float* in, int64_t count, uint16_t* out);                                // to bfloat16
  // out = by * in, both float32 or both bfloat16
  void (*multiply)(const void* in, bool bfloat16, float by, int64_t count, void* out);
};
