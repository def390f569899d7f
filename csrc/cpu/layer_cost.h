#pragma once
#include <cstdint>

// One block of every layer at a time, as dense float rows of at most kLayerBlock elements. `clamp`: null, or the value
// at and below which an element counts as 0.
constexpr int64_t kLayerBlock = 512;

struct LayerCostTable {
  // totals[i * teachers + j] += sum over `count` elements of (s_i - t_j)^2, for all pairs. The same place in the next
  // block, `ahead` elements on, is asked for meanwhile. count: a multiple of 16.
  void (*distances)(const float* const* s, int students, const float* const* t, int teachers, int64_t count,
                    int64_t ahead, double* totals);
  // `count` elements widened, clamped and packed.
  void (*pack)(const void* in, int element, const float* clamp, int64_t count, float* out);
  // out = sum over q of weights_q (s - t_q), 0 where s is clamped. `stream`: past the cache, where `out` allows it.
  void (*gradient)(const float* s, const float* const* t, const float* weights, int teachers, int64_t count,
                   const float* clamp, bool stream, float* out);
  void (*narrow)(const float* in, int element, int64_t count, bool stream, uint16_t* out);
};
