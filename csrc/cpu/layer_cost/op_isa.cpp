// All pairs of N student and M teacher layers, one block of each while it is in the second cache.
//
// Differences are taken directly, (s - t)^2: |s|^2 + |t|^2 - 2 <s, t> loses its digits exactly where a student nears
// its teacher. A tile of pairs keeps its sums in registers while it walks the block: 24 sums, 6 students, a teacher and
// a difference are all 32 registers of AVX-512 (2 students x 12 teachers took twice as long: every difference loads its
// teacher again). Few layers at a time and long blocks, so that the hardware's prefetcher keeps up with every layer; it
// loses its way whenever sums are folded, so whatever a tile is the first to read is asked for in time.
#include "cpu/layer_cost/op.h"

#include <utility>

#include "cpu/simd/isa.h"
#include "cpu/simd/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastkd::layer_cost {

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;
#else
constexpr int kRows = 3, kColumns = 3;
#endif
constexpr int64_t kRun = 64 * kLanes;  // float sums are folded into doubles after so many elements

// sums += x, its upper half folded onto the lower first.
inline void add(double* sums, vfloat x) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(half)));
#elif defined(__AVX2__)
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(half)));
#else
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[lane];
#endif
}

constexpr int64_t kAhead = 2048;  // bytes

template <int kElement>
inline void fetch(const void* p, int64_t i, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(p) + i * (kElement == 0 ? 4 : 2) + ahead, 0, 2);  // into the second cache
}

template <int kElement>
inline vfloat load_as(const void* p, int64_t i) {
  if constexpr (kElement == 0) return load(static_cast<const float*>(p) + i);
  return load_bfloat16(static_cast<const uint16_t*>(p) + i);
}

// ahead_s, ahead_t: kAhead where this tile is the first of the block to read its students, its teachers, else 0.
template <int kS, int kT, int kR, int kC>
void tile(const void* const* s, const void* const* t, int64_t count, int64_t ahead_s, int64_t ahead_t, double* sums,
          int64_t teachers) {
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = begin + kRun < count ? begin + kRun : count;
    vfloat run[kR][kC] = {};
    for (int64_t k = begin; k < end; k += kLanes) {
      vfloat a[kR];
      for (int r = 0; r < kR; ++r) fetch<kS>(s[r], k, ahead_s);
      for (int c = 0; c < kC; ++c) fetch<kT>(t[c], k, ahead_t);
      for (int r = 0; r < kR; ++r) a[r] = load_as<kS>(s[r], k);
      for (int c = 0; c < kC; ++c) {
        const vfloat b = load_as<kT>(t[c], k);
        for (int r = 0; r < kR; ++r) run[r][c] += (a[r] - b) * (a[r] - b);
      }
    }
    for (int r = 0; r < kR; ++r)
      for (int c = 0; c < kC; ++c) add(sums + (r * teachers + c) * kLayerSums, run[r][c]);
  }
}

using Tile = decltype(&tile<0, 0, 1, 1>);

template <int kS, int kT, int kR, int... kC>
Tile tile_of(int columns, std::integer_sequence<int, kC...>) {
  static constexpr Tile kTiles[] = {tile<kS, kT, kR, kC + 1>...};
  return kTiles[columns - 1];
}

template <int kS, int kT, int... kR>
Tile tile_of(int rows, int columns, std::integer_sequence<int, kR...>) {
  using Of = Tile (*)(int, std::make_integer_sequence<int, kColumns>);
  static constexpr Of kRowsOf[] = {tile_of<kS, kT, kR + 1>...};
  return kRowsOf[rows - 1](columns, {});
}

// The largest step that covers `count` in as few steps as `most` would, all of about one size.
inline int even_step(int count, int most) {
  const int steps = (count + most - 1) / most;
  return (count + steps - 1) / steps;
}

template <int kS, int kT>
void distances_of(const void* const* s, int students, const void* const* t, int teachers, int64_t count, double* sums) {
  const int step_s = even_step(students, kRows), step_t = even_step(teachers, kColumns);
  for (int i = 0; i < students; i += step_s)
    for (int j = 0; j < teachers; j += step_t) {
      const int rows = students - i < step_s ? students - i : step_s;
      const int columns = teachers - j < step_t ? teachers - j : step_t;
      const Tile run = tile_of<kS, kT>(rows, columns, std::make_integer_sequence<int, kRows>());
      run(s + i, t + j, count, j ? 0 : kAhead, i ? 0 : kAhead, sums + (int64_t(i) * teachers + j) * kLayerSums,
          teachers);
    }
}

void squared_distances(const void* const* s, int element_s, int students, const void* const* t, int element_t,
                       int teachers, int64_t count, double* sums) {
  const auto run = element_t == 0 ? distances_of<0, 0> : element_s == 0 ? distances_of<0, 1> : distances_of<1, 1>;
  run(s, students, t, teachers, count, sums);
}

inline vfloat clamped(vfloat x, const float* clamp) { return clamp ? (x <= *clamp ? vfloat{} : x) : x; }

void to_float32(const void* in, int element, const float* clamp, int64_t count, float* out) {
  const float* from = as_floats(in, element, out, count);
  if (from == out && !clamp) return;
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(out + k, clamped(load(from + k), clamp));
  if (k < count) store_some(out + k, clamped(load_some(from + k, int(count - k), 0), clamp), int(count - k));
}

void from_float32(const float* in, int element, int64_t count, void* out) {
  (element == 1 ? narrow_bfloat16 : narrow_float16)(in, static_cast<uint16_t*>(out), count);
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

inline void store_past_the_cache(uint16_t* p, vhalf x) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)x);
#else
  std::memcpy(p, &x, sizeof x);
#endif
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <int kElement, bool kStream>
inline void store_as(void* p, int64_t i, vfloat x) {
  if constexpr (kElement == 0) {
    float* to = static_cast<float*>(p) + i;
    kStream ? store_past_the_cache(to, x) : store(to, x);
  } else {
    uint16_t* to = static_cast<uint16_t*>(p) + i;
    const vhalf narrow = to_bfloat16(x);
    if (kStream)
      store_past_the_cache(to, narrow);
    else
      std::memcpy(to, &narrow, sizeof narrow);
  }
}

// [k, ...) of the gradient, kWidth vectors at a time; returns where it stopped.
template <int kS, int kT, int kWidth, bool kStream>
int64_t gradient_from(int64_t k, const void* s, const void* const* t, const float* weights, int teachers, int64_t count,
                      const float* clamp, void* out) {
  for (; k + kWidth * kLanes <= count; k += kWidth * kLanes) {
    vfloat a[kWidth], sums[kWidth] = {};
    for (int v = 0; v < kWidth; ++v) a[v] = load_as<kS>(s, k + v * kLanes);
    for (int q = 0; q < teachers; ++q)
      for (int v = 0; v < kWidth; ++v)
        sums[v] += (a[v] - clamped(load_as<kT>(t[q], k + v * kLanes), clamp)) * weights[q];
    if (clamp)
      for (int v = 0; v < kWidth; ++v) sums[v] = a[v] <= *clamp ? vfloat{} : sums[v];
    for (int v = 0; v < kWidth; ++v) store_as<kS, kStream>(out, k + v * kLanes, sums[v]);
  }
  return k;
}

template <int kS, int kT>
void gradient_of(const void* s, const void* const* t, const float* weights, int teachers, int64_t count,
                 const float* clamp, bool stream, void* out) {
  constexpr int kSize = kS == 0 ? 4 : 2;
  int64_t k = 0;
  if (stream && reinterpret_cast<uintptr_t>(out) % (kLanes * kSize) == 0) {
    k = gradient_from<kS, kT, 4, true>(k, s, t, weights, teachers, count, clamp, out);
    finish_streaming();
  } else {
    k = gradient_from<kS, kT, 4, false>(k, s, t, weights, teachers, count, clamp, out);
  }
  k = gradient_from<kS, kT, 1, false>(k, s, t, weights, teachers, count, clamp, out);
  const int64_t rest = count - k;
  if (rest <= 0) return;
  const auto end = [&](const void* p, int size, void* buffer) {
    std::memset(buffer, 0, 4 * kLanes);
    std::memcpy(buffer, static_cast<const char*>(p) + k * size, rest * size);
    return buffer;
  };
  float last_s[kLanes], last_t[kLanes], last[kLanes];
  vfloat a = load_as<kS>(end(s, kSize, last_s), 0), sum = {};
  for (int q = 0; q < teachers; ++q)
    sum += (a - clamped(load_as<kT>(end(t[q], kT == 0 ? 4 : 2, last_t), 0), clamp)) * weights[q];
  store_as<kS, false>(last, 0, clamp ? (a <= *clamp ? vfloat{} : sum) : sum);
  std::memcpy(static_cast<char*>(out) + k * kSize, last, rest * kSize);
}

void gradient(const void* s, int element_s, const void* const* t, int element_t, const float* weights, int teachers,
              int64_t count, const float* clamp, bool stream, void* out) {
  const auto run = element_t == 0 ? gradient_of<0, 0> : element_s == 0 ? gradient_of<0, 1> : gradient_of<1, 1>;
  run(s, t, weights, teachers, count, clamp, stream, out);
}

}  // namespace

const Table FASTKD_TABLE(table) = {squared_distances, gradient, to_float32, from_float32};

}  // namespace fastkd::layer_cost
