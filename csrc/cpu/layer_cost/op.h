#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::layer_cost {

// One block of every layer at a time. Both sides come as float32, or both as bfloat16, or float32 beside bfloat16
// (students, teachers); everything else is packed into floats first. `element` as in cpu/runtime/tensors.h; `clamp`:
// null, or the value at and below which an element counts as 0.
constexpr int64_t kLayerPad = 16;  // a multiple of every instruction set's vector
constexpr int64_t kLayerSums = 8;  // partial sums per pair

constexpr bool layers_are_read_as_they_are(int element_s, int element_t) {
  return element_t == 0 ? element_s == 0 : element_t == 1 && element_s <= 1;
}

struct Table {
  // sums[(i * teachers + j) * kLayerSums + lane] += (s_i - t_j)^2 over `count` elements, for all pairs; lanes are to
  // be added up at the end. count: a multiple of kLayerPad.
  void (*squared_distances)(const void* const* s, int element_s, int students, const void* const* t, int element_t,
                            int teachers, int64_t count, double* sums);
  // out = sum over q of weights_q (s - t_q), 0 where s is clamped, in the element of s. `stream`: past the cache, where
  // `out` allows it.
  void (*gradient)(const void* s, int element_s, const void* const* t, int element_t, const float* weights,
                   int teachers, int64_t count, const float* clamp, bool stream, void* out);
  // `count` elements widened, clamped and packed; and back, rounded.
  void (*to_float32)(const void* in, int element, const float* clamp, int64_t count, float* out);
  void (*from_float32)(const float* in, int element, int64_t count, void* out);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::layer_cost
