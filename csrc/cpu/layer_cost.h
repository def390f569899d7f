#pragma once
#include <cstdint>

// One block of every layer at a time, as dense float rows. `clamp`: null, or the value at and below which an element
// counts as 0.
constexpr int64_t kLayerLanes = 16;  // a multiple of every instruction set's vector

struct LayerCostTable {
  // sums[(i * teachers + j) * kLayerLanes + lane] += (s_i - t_j)^2 over `count` elements, for all pairs; lanes are to
  // be added up at the end. count: a multiple of kLayerLanes.
  void (*distances)(const float* const* s, int students, const float* const* t, int teachers, int64_t count,
                    double* sums);
  // `count` elements widened, clamped and packed.
  void (*pack)(const void* in, int element, const float* clamp, int64_t count, float* out);
  // out = sum over q of weights_q (s - t_q), 0 where s is clamped. `stream`: past the cache, where `out` allows it.
  void (*gradient)(const float* s, const float* const* t, const float* weights, int teachers, int64_t count,
                   const float* clamp, bool stream, float* out);
  void (*narrow)(const float* in, int element, int64_t count, bool stream, uint16_t* out);
};
