// A vector of floats as wide as this unit's instruction set, in the compiler's vector extensions: one source for all.
//
// Only for *_isa.cpp units: everything has internal linkage, so that no two instruction sets are ever merged.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/simd/lanes.h"

namespace {

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));  // for sums of bits, which may wrap
typedef uint16_t vhalf __attribute__((vector_size(kLanes * 2)));
typedef double vdouble __attribute__((vector_size(kLanes * 8)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline vfloat splat(float x) { return vfloat{} + x; }
inline vint bits(vfloat x) { return (vint)x; }
inline vfloat from_bits(vint x) { return (vfloat)x; }
inline vfloat magnitude(vfloat x) { return from_bits(bits(x) & 0x7fffffff); }

// The larger of a and b; if either is NaN, b. One instruction, which the compiler does not find by itself.
inline vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline vfloat smaller(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// x 2^n for a whole n >= -1500; past the range of floats 0 or infinity, as it should be.
inline vfloat scale_by_power(vfloat x, vfloat n, vint n_in_low_bits) {
#if defined(__AVX512F__)
  (void)n_in_low_bits;
  return (vfloat)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const vfloat scaled = x * from_bits((vint)(((vuint)n_in_low_bits << 23) + 0x3f800000u));
  return n < -126.f ? vfloat{} : (n > 127.f ? x * kInfinity : scaled);
#endif
}

inline vfloat load(const void* p) {
  vfloat x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vfloat load_bfloat16(const uint16_t* p) {
  vhalf x;
  std::memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)  // one instruction, of which __builtin_convertvector makes four
  return from_bits((vint)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#elif defined(__AVX2__)
  return from_bits((vint)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return from_bits(__builtin_convertvector(x, vint) << 16);
#endif
}
inline void store(void* p, vfloat x) { std::memcpy(p, &x, sizeof x); }

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }
inline vfloat load_some(const float* p, int count, float rest) {
  return (vfloat)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first_lanes(count), p);
}
inline void store_some(float* p, vfloat x, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)x); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vfloat load_some(const float* p, int count, float rest) {
  const __m256i there = first_lanes(count);
  return (vfloat)_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p, there), (__m256)there);
}
inline void store_some(float* p, vfloat x, int count) {
  if (count == kLanes) return store(p, x);
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)x);
}
#else
inline vfloat load_some(const float* p, int count, float rest) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : rest;
  return load(lanes);
}
inline void store_some(float* p, vfloat x, int count) {
  if (count == kLanes) return store(p, x);
  float lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(float));
}
#endif

inline float sum_lanes(vfloat x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[kLanes], sum = 0;
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
#endif
}
inline vdouble wide(vfloat x) { return __builtin_convertvector(x, vdouble); }
inline double sum_lanes(vdouble x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}
inline float max_lanes(vfloat x) {
  float lanes[kLanes];
  store(lanes, x);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}
inline bool any_lane(vint x) {
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= x[i];
  return any != 0;
}
inline float min_lanes(vfloat x) { return -max_lanes(-x); }

// e^x, e^x - 1, and e^x - 1 - x without the cancellations that the last two names promise to avoid.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + w. Where n = 0, r is x itself, so every digit of w survives.
struct Exponential {
  vfloat x, power, r, w;  // power = 2^n
  vfloat exp() const { return power + power * (r + w); }
  vfloat expm1() const { return power * (r + w) + (power - 1.f); }
  vfloat expm1_minus_x() const { return power * w + ((power * r + (power - 1.f)) - x); }
};

inline Exponential exponential(vfloat x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  const vfloat bounded = larger(splat(-1000.f), x);  // -inf would be inf - inf below; NaN stays
  const vfloat shifted = bounded * 1.44269504088896341f + kRound;
  const vfloat n = shifted - kRound;
  const vfloat r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vfloat w = splat(1.f / 5040) * r + 1.f / 720;
  w = w * r + 1.f / 120;
  w = w * r + 1.f / 24;
  w = w * r + 1.f / 6;
  w = (w * r + 0.5f) * (r * r);
  return {bounded, scale_by_power(splat(1.f), n, bits(shifted)), r, w};
}

inline vfloat exp(vfloat x) { return exponential(x).exp(); }

// 2^u for |u| <= 1000, to 8e-8 relative: the shortest way where neither 2^u - 1 nor an infinite u is asked for.
inline vfloat power_of_two(vfloat u) {
  constexpr float kRound = 12582912.f;
  const vfloat shifted = u + kRound, n = shifted - kRound, f = u - n;
  vfloat w = splat(1.53533506e-4f) * f + 1.33988750e-3f;
  w = w * f + 9.61843692e-3f;
  w = w * f + 5.55033237e-2f;
  w = w * f + 0.240226477f;
  w = w * f + 0.693147182f;
  return scale_by_power(w * f + 1.f, n, bits(shifted));
}

// log(1 + y) and y - log(1 + y), the latter with all its digits as y -> 0 (it is about y^2 / 2 there, never negative).
struct Logarithm {
  vfloat log1p, y_minus_log1p;
};

// u = 1 + y, which may be known better than y.
inline Logarithm logarithm(vfloat y, vfloat u) {
  const vint small = magnitude(y) < 0.4f;
  const vint exponent = (vint)((vuint)bits(u) - 0x3f3504f3u) >> 23;  // u = 2^exponent m, sqrt(1/2) <= m < sqrt(2)
  const vfloat m = from_bits((vint)((vuint)bits(u) - ((vuint)exponent << 23)));
  const vfloat z = small ? y : m - 1.f;
  const vfloat s = z / (2.f + z);  // log(1 + z) = 2 s + 2 s^3 / 3 + 2 s^5 / 5 + ...
  const vfloat s2 = s * s;
  const vfloat tail = s * s2 * (2.f / 3 + s2 * (2.f / 5 + s2 * (2.f / 7 + s2 * (2.f / 9))));
  const vfloat large = __builtin_convertvector(exponent, vfloat) * 0.693147180559945309f + (2.f * s + tail);
  vfloat log1p = small ? 2.f * s + tail : large;
  log1p = u > 0.f ? log1p : (u == 0.f ? splat(-kInfinity) : u * 0.f / 0.f);  // log 0, and NaN stays NaN
  log1p = u == kInfinity ? u : log1p;
  return {log1p, small ? y * s - tail : y - log1p};
}

inline Logarithm logarithm(vfloat y) { return logarithm(y, 1.f + y); }

// log u for a normal u > 0; NaN stays NaN.
inline vfloat natural_logarithm(vfloat u) {
  const vint exponent = (vint)((vuint)bits(u) - 0x3f3504f3u) >> 23;  // as above
  const vfloat z = from_bits((vint)((vuint)bits(u) - ((vuint)exponent << 23))) - 1.f;
  const vfloat s = z / (2.f + z), s2 = s * s;
  const vfloat tail = s * s2 * (2.f / 3 + s2 * (2.f / 5 + s2 * (2.f / 7 + s2 * (2.f / 9))));
  return __builtin_convertvector(exponent, vfloat) * 0.693147180559945309f + (2.f * s + tail) + (u - u);
}

// Half-precision rows become float rows once, in a scratch that stays in the cache.
inline void widen_bfloat16(const uint16_t* in, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t wide = uint32_t(in[i]) << 16;
    std::memcpy(out + i, &wide, 4);
  }
}

// The bfloat16 is the upper half of each lane: rounded to nearest, ties to even; a NaN keeps its upper half and is
// quiet.
inline vuint bfloat16_bits(vfloat x) {
  const vuint u = (vuint)x, rounded = u + 0x7fffu + ((u >> 16) & 1u), nan = (vuint)(x != x);
  return ((rounded & ~nan) | ((u | 0x400000u) & nan)) & 0xffff0000u;
}

inline vhalf to_bfloat16(vfloat x) {
#if defined(__AVX512F__)
  return (vhalf)_mm512_cvtepi32_epi16((__m512i)(bfloat16_bits(x) >> 16));
#else
  return __builtin_convertvector(bfloat16_bits(x) >> 16, vhalf);
#endif
}

inline void narrow_bfloat16(const float* in, uint16_t* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    uint32_t wide;
    std::memcpy(&wide, in + i, 4);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
    out[i] = (wide & 0x7fffffff) > 0x7f800000 ? uint16_t((wide >> 16) | 64) : uint16_t(rounded);
  }
}

#if defined(__F16C__)
inline void widen_float16(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < count; ++i) out[i] = _cvtsh_ss(in[i]);
}

inline void narrow_float16(const float* in, uint16_t* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
  for (; i < count; ++i) out[i] = _cvtss_sh(in[i], 0);
}
#else
inline void widen_float16(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sign = uint32_t(in[i] & 0x8000) << 16, magnitude_bits = in[i] & 0x7fff;
    float value;
    if (magnitude_bits >= 0x7c00) {
      const uint32_t wide = 0x7f800000 | ((magnitude_bits & 0x3ff) << 13);
      std::memcpy(&value, &wide, 4);
    } else {  // the exponent moves by 112; a multiplication puts subnormals right too
      const uint32_t wide = magnitude_bits << 13;
      std::memcpy(&value, &wide, 4);
      value *= 5.192296858534828e33f;  // 2^112
    }
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    wide |= sign;
    std::memcpy(out + i, &wide, 4);
  }
}

inline void narrow_float16(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t wide;
    std::memcpy(&wide, in + i, 4);
    const uint16_t sign = (wide >> 16) & 0x8000;
    wide &= 0x7fffffff;
    float value;
    std::memcpy(&value, &wide, 4);
    uint32_t half;
    if (wide > 0x7f800000) {
      half = 0x7e00;
    } else if (value >= 65520.f) {
      half = 0x7c00;
    } else if (value <
               6.103515625e-05f) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
      value += 0.5f;
      std::memcpy(&wide, &value, 4);
      half = wide - 0x3f000000;
    } else {
      half = (wide + 0xfff + ((wide >> 13) & 1) - (112u << 23)) >> 13;
    }
    out[i] = sign | uint16_t(half);
  }
}
#endif

// A row as floats: itself if it is float32, else widened into `scratch`. `element` as in cpu/runtime/tensors.h.
inline const float* as_floats(const void* row, int element, float* scratch, int64_t count) {
  if (element == 0) return static_cast<const float*>(row);
  (element == 1 ? widen_bfloat16 : widen_float16)(static_cast<const uint16_t*>(row), scratch, count);
  return scratch;
}

}  // namespace
