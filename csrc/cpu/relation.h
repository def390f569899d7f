#pragma once
#include <cstdint>

// A tile of scores is [keys][queries], rows `stride` apart: queries lie in the lanes, so nothing is summed across them.
// `queries` is filled up to a multiple of kRelationLanes; what comes out of the lanes beyond is never looked at.
constexpr int64_t kRelationLanes = 16;

struct RelationTile {
  float *s, *t;
  int64_t stride, keys, queries;
};

// Per query: the largest score of each side, sum e^(t - max t), and sum e^(s - max s) less that.
struct RelationStats {
  float *max_t, *sum_t, *max_s, *excess;
};

struct RelationTable {
  // Scores of keys after the query, in the square at the diagonal, become so small that they count for nothing.
  void (*hide)(const RelationTile& at);
  // `keep`: e^(t - max t) and e^(s - max s) - e^(t - max t) are left where the scores were.
  void (*statistics)(const RelationTile& at, bool keep, const RelationStats& of, float* values);
  // s = g (q - p), from what `statistics` kept, or from scores once more.
  void (*from_kept)(const RelationTile& at, const RelationStats& of, const float* g);
  void (*from_scores)(const RelationTile& at, const RelationStats& of, const float* g);
  void (*narrow)(const float* in, int64_t count, uint16_t* out);  // to bfloat16
  // out = by * in, both float32 or both bfloat16
  void (*multiply)(const void* in, bool bfloat16, float by, int64_t count, void* out);
};
