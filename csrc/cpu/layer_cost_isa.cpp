// All pairs of N student and M teacher layers, one block of each while it is in the first cache.
//
// Differences are taken directly, (s - t)^2: |s|^2 + |t|^2 - 2 <s, t> loses its digits exactly where a student nears
// its teacher. A tile of pairs keeps its sums in registers while it walks the block: kRows students x kColumns teachers
// (24 sums, 2 students, a teacher and a difference are 28 of AVX-512's 32 registers; elsewhere there are 16).
#include "cpu/layer_cost.h"

#include <utility>

#include "cpu/isa.h"
#include "cpu/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 2, kColumns = 12;
#else
constexpr int kRows = 2, kColumns = 5;
#endif

template <int kR, int kC>
void tile(const float* const* s, const float* const* t, int64_t count, int64_t ahead_s, int64_t ahead_t, double* totals,
          int64_t stride) {
  vfloat sums[kR][kC] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    vfloat a[kR];
    for (int r = 0; r < kR; ++r) {
      a[r] = load(s[r] + k);
      __builtin_prefetch(s[r] + k + ahead_s);
    }
    for (int c = 0; c < kC; ++c) {
      const vfloat b = load(t[c] + k);
      __builtin_prefetch(t[c] + k + ahead_t);
      for (int r = 0; r < kR; ++r) sums[r][c] += (a[r] - b) * (a[r] - b);
    }
  }
  for (int r = 0; r < kR; ++r)
    for (int c = 0; c < kC; ++c) totals[r * stride + c] += sum_lanes(sums[r][c]);
}

using Tile = decltype(&tile<1, 1>);

template <int kR, int... kC>
constexpr Tile tile_of(int columns, std::integer_sequence<int, kC...>) {
  constexpr Tile kTiles[] = {tile<kR, kC + 1>...};
  return kTiles[columns - 1];
}

template <int... kR>
constexpr Tile tile_of(int rows, int columns, std::integer_sequence<int, kR...>) {
  const Tile kTiles[] = {tile_of<kR + 1>(columns, std::make_integer_sequence<int, kColumns>())...};
  return kTiles[rows - 1];
}

void distances(const float* const* s, int students, const float* const* t, int teachers, int64_t count, int64_t ahead,
               double* totals) {
  for (int i = 0; i < students; i += kRows) {
    const int rows = students - i < kRows ? students - i : kRows;
    for (int j = 0; j < teachers; j += kColumns) {
      const int columns = teachers - j < kColumns ? teachers - j : kColumns;
      const Tile run = tile_of(rows, columns, std::make_integer_sequence<int, kRows>());
      run(s + i, t + j, count, j ? 0 : ahead, i ? 0 : ahead, totals + int64_t(i) * teachers + j, teachers);
    }
  }
}

inline vfloat kept(vfloat x, const float* clamp) { return clamp ? (x <= *clamp ? vfloat{} : x) : x; }

void pack(const void* in, int element, const float* clamp, int64_t count, float* out) {
  const float* from = as_floats(in, element, out, count);
  if (from == out && !clamp) return;
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(out + k, kept(load(from + k), clamp));
  if (k < count) store_some(out + k, kept(load_some(from + k, int(count - k), 0), clamp), int(count - k));
}

inline void store_past_the_cache(float* p, vfloat x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(vfloat) == 0; }

template <int kWidth, bool kClamp, bool kStream>
int64_t gradient_from(int64_t k, const float* s, const float* const* t, const float* weights, int teachers,
                      int64_t count, const float* clamp, float* out) {
  for (; k + kWidth * kLanes <= count; k += kWidth * kLanes) {
    vfloat a[kWidth], sums[kWidth] = {};
    for (int v = 0; v < kWidth; ++v) a[v] = load(s + k + v * kLanes);
    for (int q = 0; q < teachers; ++q)
      for (int v = 0; v < kWidth; ++v)
        sums[v] += (a[v] - kept(load(t[q] + k + v * kLanes), kClamp ? clamp : nullptr)) * weights[q];
    for (int v = 0; v < kWidth; ++v) {
      if (kClamp) sums[v] = a[v] <= *clamp ? vfloat{} : sums[v];
      if (kStream)
        store_past_the_cache(out + k + v * kLanes, sums[v]);
      else
        store(out + k + v * kLanes, sums[v]);
    }
  }
  return k;
}

template <bool kClamp>
void gradient_of(const float* s, const float* const* t, const float* weights, int teachers, int64_t count,
                 const float* clamp, bool stream, float* out) {
  int64_t k = 0;
  if (stream && aligned(out)) {
    k = gradient_from<4, kClamp, true>(k, s, t, weights, teachers, count, clamp, out);
    k = gradient_from<1, kClamp, true>(k, s, t, weights, teachers, count, clamp, out);
    finish_streaming();
  } else {
    k = gradient_from<4, kClamp, false>(k, s, t, weights, teachers, count, clamp, out);
    k = gradient_from<1, kClamp, false>(k, s, t, weights, teachers, count, clamp, out);
  }
  for (; k < count; ++k) {
    float sum = 0;
    for (int q = 0; q < teachers; ++q) sum += (s[k] - (kClamp && t[q][k] <= *clamp ? 0 : t[q][k])) * weights[q];
    out[k] = kClamp && s[k] <= *clamp ? 0 : sum;
  }
}

void gradient(const float* s, const float* const* t, const float* weights, int teachers, int64_t count,
              const float* clamp, bool stream, float* out) {
  (clamp ? gradient_of<true> : gradient_of<false>)(s, t, weights, teachers, count, clamp, stream, out);
}

void narrow(const float* in, int element, int64_t count, bool stream, uint16_t* out) {
  const auto to = element == 1 ? narrow_bfloat16 : narrow_float16;
  if (!stream || !aligned(out)) return to(in, out, count);
  alignas(64) uint16_t lanes[2 * kLanes];
  int64_t k = 0;
  for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
    to(in + k, lanes, 2 * kLanes);
    float packed[kLanes];
    std::memcpy(packed, lanes, sizeof packed);
    store_past_the_cache(reinterpret_cast<float*>(out + k), load(packed));
  }
  finish_streaming();
  to(in + k, out + k, count - k);
}

}  // namespace

extern const LayerCostTable FASTKD_TABLE(layer_cost);
const LayerCostTable FASTKD_TABLE(layer_cost) = {distances, pack, gradient, narrow};
