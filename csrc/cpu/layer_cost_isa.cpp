// All pairs of N student and M teacher layers, one block of each while it is in the second cache.
//
// Differences are taken directly, (s - t)^2: |s|^2 + |t|^2 - 2 <s, t> loses its digits exactly where a student nears
// its teacher. A tile of pairs keeps its sums in registers while it walks the block: 24 sums, 6 students, a teacher and
// a difference are all 32 registers of AVX-512 (2 students x 12 teachers took twice as long: every difference loads its
// teacher again). Few layers at a time and long blocks, so that the hardware's prefetcher keeps up with every layer.
#include "cpu/layer_cost.h"

#include <utility>

#include "cpu/isa.h"
#include "cpu/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;
#else
constexpr int kRows = 3, kColumns = 3;
#endif
constexpr int64_t kRun = 64 * kLanes;  // float sums are folded into doubles after so many elements

typedef double vdouble __attribute__((vector_size(kLanes * 8)));

inline void add(double* sums, vfloat x) {
  vdouble sum;
  std::memcpy(&sum, sums, sizeof sum);
  sum += __builtin_convertvector(x, vdouble);
  std::memcpy(sums, &sum, sizeof sum);
}

template <int kR, int kC>
void tile(const float* const* s, const float* const* t, int64_t count, double* sums, int64_t teachers) {
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = begin + kRun < count ? begin + kRun : count;
    vfloat run[kR][kC] = {};
    for (int64_t k = begin; k < end; k += kLanes) {
      vfloat a[kR];
      for (int r = 0; r < kR; ++r) a[r] = load(s[r] + k);
      for (int c = 0; c < kC; ++c) {
        const vfloat b = load(t[c] + k);
        for (int r = 0; r < kR; ++r) run[r][c] += (a[r] - b) * (a[r] - b);
      }
    }
    for (int r = 0; r < kR; ++r)
      for (int c = 0; c < kC; ++c) add(sums + (r * teachers + c) * kLayerLanes, run[r][c]);
  }
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

// The largest step that covers `count` in as few steps as `most` would, all of about one size.
inline int even_step(int count, int most) {
  const int steps = (count + most - 1) / most;
  return (count + steps - 1) / steps;
}

void distances(const float* const* s, int students, const float* const* t, int teachers, int64_t count, double* sums) {
  const int step_s = even_step(students, kRows), step_t = even_step(teachers, kColumns);
  for (int i = 0; i < students; i += step_s) {
    const int rows = students - i < step_s ? students - i : step_s;
    for (int j = 0; j < teachers; j += step_t) {
      const int columns = teachers - j < step_t ? teachers - j : step_t;
      const Tile run = tile_of(rows, columns, std::make_integer_sequence<int, kRows>());
      run(s + i, t + j, count, sums + (int64_t(i) * teachers + j) * kLayerLanes, teachers);
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
