// Packing for gemm/gemm_isa.cpp: rows of any type and stride into panels of 32-bit units.
//
// A unit is one float32, or two bfloat16 neighbours in k (an odd k ends with a zero). A panel of P rows is
// unit[ceil(k / per unit)][P]. Everything is done on blocks of kLanes rows by kLanes units, kLanes being the lanes of a
// vector.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/gemm/gemm.h"
#include "cpu/simd/vec.h"

namespace fastkd {
namespace {

#define FASTKD_INLINE inline __attribute__((always_inline))

// kLanes elements of a type, as float32.
struct Float32 {
  static constexpr bool pairs_as_it_lies = false;
  typedef float Type;
  static FASTKD_INLINE vfloat load(const float* x) { return ::load(x); }
};
struct BFloat16 {
  static constexpr bool pairs_as_it_lies = true;
  typedef uint16_t Type;
  static FASTKD_INLINE vfloat load(const uint16_t* x) { return load_bfloat16(x); }
};
struct Float16 {
  static constexpr bool pairs_as_it_lies = false;
  typedef uint16_t Type;
  static FASTKD_INLINE vfloat load(const uint16_t* x) {
    vhalf half;
    std::memcpy(&half, x, sizeof half);
    const vuint u = __builtin_convertvector(half, vuint), exponent = u & 0x7c00u;
    const vuint finite = (vuint)((vfloat)((u & 0x7fffu) << 13) * 0x1p112f);  // subnormals come out right as well
    const vuint special = (vuint)(exponent == 0x7c00u);
    return (vfloat)(finite | (special & 0x7f800000u) | ((u & 0x8000u) << 16));
  }
};
struct LowPart {
  static constexpr bool pairs_as_it_lies = false;
  typedef float Type;
  static FASTKD_INLINE vfloat load(const float* x) {
    const vfloat value = ::load(x);
    return value - (vfloat)(bfloat16_bits(value));
  }
};

// The lanes of two vectors, chosen by a list of kLanes numbers (the second vector's count from kLanes).
#if defined(__clang__)
#define FASTKD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTKD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vuint{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
#define FASTKD_LOW_UNITS 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define FASTKD_HIGH_UNITS 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FASTKD_LOW_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define FASTKD_HIGH_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FASTKD_EVEN_QUARTETS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define FASTKD_ODD_QUARTETS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define FASTKD_LOW_HALF 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define FASTKD_HIGH_HALF 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#elif defined(__AVX2__)
#define FASTKD_LOW_UNITS 0, 8, 1, 9, 4, 12, 5, 13
#define FASTKD_HIGH_UNITS 2, 10, 3, 11, 6, 14, 7, 15
#define FASTKD_LOW_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define FASTKD_HIGH_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
#define FASTKD_EVEN_QUARTETS 0, 1, 2, 3, 8, 9, 10, 11
#define FASTKD_ODD_QUARTETS 4, 5, 6, 7, 12, 13, 14, 15
#define FASTKD_LOW_HALF 0, 1, 2, 3, 8, 9, 10, 11
#define FASTKD_HIGH_HALF 4, 5, 6, 7, 12, 13, 14, 15
#else
#define FASTKD_LOW_UNITS 0, 4, 1, 5
#define FASTKD_HIGH_UNITS 2, 6, 3, 7
#define FASTKD_LOW_PAIRS 0, 1, 4, 5
#define FASTKD_HIGH_PAIRS 2, 3, 6, 7
#define FASTKD_LOW_HALF 0, 1, 4, 5
#define FASTKD_HIGH_HALF 2, 3, 6, 7
#endif

#if defined(__AVX2__)
// Between x[i] and x[i + group]: the even quartets of lanes to the first, the odd ones to the second.
template <int group>
FASTKD_INLINE void exchange_quartets(vfloat (&x)[kLanes]) {
#pragma GCC unroll 8
  for (int pair = 0; pair < kLanes / 2; ++pair) {
    const int i = pair / group * 2 * group + pair % group;
    const vfloat a = x[i], b = x[i + group];
    x[i] = FASTKD_SHUFFLE(a, b, FASTKD_EVEN_QUARTETS);
    x[i + group] = FASTKD_SHUFFLE(a, b, FASTKD_ODD_QUARTETS);
  }
}
#endif

// vuint, then pairs of words, change places within each quartet of lanes; then the quartets do.
FASTKD_INLINE void transpose(vfloat (&x)[kLanes]) {
  vfloat y[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = FASTKD_SHUFFLE(x[i], x[i + 1], FASTKD_LOW_UNITS);
    y[i + 1] = FASTKD_SHUFFLE(x[i], x[i + 1], FASTKD_HIGH_UNITS);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {  // x[i + c]: of rows i to i + 3, the columns c, c + 4, ...
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      x[i + 2 * c] = FASTKD_SHUFFLE(y[i + c], y[i + c + 2], FASTKD_LOW_PAIRS);
      x[i + 2 * c + 1] = FASTKD_SHUFFLE(y[i + c], y[i + c + 2], FASTKD_HIGH_PAIRS);
    }
  }
#if defined(__AVX2__)
  exchange_quartets<4>(x);
#endif
#if defined(__AVX512F__)
  exchange_quartets<8>(x);
#endif
}

// Where neither direction is contiguous, or the block is not whole: element by element through memory.
template <class Source>
void gather_floats(const typename Source::Type* x, const GemmSource& s, int64_t rows, int64_t k,
                   vfloat (&out)[kLanes]) {
  typename Source::Type block[kLanes * kLanes];
  std::memset(block, 0, sizeof block);  // [k][rows]; zero bits are 0 in every type
  rows = rows < kLanes ? rows : kLanes, k = k < kLanes ? k : kLanes;
  for (int64_t p = 0; p < k; ++p)
    for (int64_t i = 0; i < rows; ++i) block[p * kLanes + i] = x[i * s.row_stride + p * s.k_stride];
  for (int p = 0; p < kLanes; ++p) out[p] = Source::load(block + p * kLanes);
}

// out[p] = x[0:kLanes, p] for kLanes values of p; rows and k say how many there are, the others are 0.
template <class Source>
FASTKD_INLINE void load_floats(const typename Source::Type* x, const GemmSource& s, int64_t rows, int64_t k,
                               vfloat (&out)[kLanes]) {
  if (s.k_stride == 1 && k >= kLanes) {
    if (rows >= kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) out[i] = Source::load(x + i * s.row_stride);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) out[i] = i < rows ? Source::load(x + i * s.row_stride) : vfloat{};
    }
    transpose(out);
  } else if (s.row_stride == 1 && rows >= kLanes) {
#pragma GCC unroll 16
    for (int p = 0; p < kLanes; ++p) out[p] = p < k ? Source::load(x + p * s.k_stride) : vfloat{};
  } else {
    vfloat gathered[kLanes];
    gather_floats<Source>(x, s, rows, k, gathered);
#pragma GCC unroll 16
    for (int p = 0; p < kLanes; ++p) out[p] = gathered[p];
  }
}

// out[u] = units u of kLanes rows.
template <class Source, bool pairs>
FASTKD_INLINE void load_units(const typename Source::Type* x, const GemmSource& s, int64_t rows, int64_t k,
                              vfloat (&out)[kLanes]) {
  if constexpr (!pairs) {
    load_floats<Source>(x, s, rows, k, out);
  } else {
    if constexpr (Source::pairs_as_it_lies) {
      if (s.k_stride == 1 && k >= 2 * kLanes) {  // two neighbours are a unit already
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) out[i] = i < rows ? load(x + i * s.row_stride) : vfloat{};
        return transpose(out);
      }
      if (s.row_stride == 1 && rows >= kLanes) {
#pragma GCC unroll 16
        for (int u = 0; u < kLanes; ++u) {
          const vfloat even = 2 * u < k ? Source::load(x + 2 * u * s.k_stride) : vfloat{};
          const vfloat odd = 2 * u + 1 < k ? Source::load(x + (2 * u + 1) * s.k_stride) : vfloat{};
          out[u] = (vfloat)((vuint)(even) >> 16 | (vuint)(odd));
        }
        return;
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vfloat part[kLanes];
      load_floats<Source>(x + half * kLanes * s.k_stride, s, rows, k - half * kLanes, part);
#pragma GCC unroll 8
      for (int u = 0; u < kLanes / 2; ++u)
        out[half * (kLanes / 2) + u] = (vfloat)((bfloat16_bits(part[2 * u]) >> 16) | bfloat16_bits(part[2 * u + 1]));
    }
  }
}

// kLanes rows (or the half of them that exists) by `units` units, to the panel or the two panels that they fill.
template <int P>
FASTKD_INLINE void store_units(vfloat (&block)[kLanes], int64_t units, bool second_panel, float* out, int64_t panel) {
  if constexpr (P == kLanes / 2) {  // a vector holds two units of one panel
#pragma GCC unroll 8
    for (int u = 0; u < kLanes; u += 2) {
      const vfloat even = block[u], odd = block[u + 1];
      block[u] = FASTKD_SHUFFLE(even, odd, FASTKD_LOW_HALF);
      block[u + 1] = FASTKD_SHUFFLE(even, odd, FASTKD_HIGH_HALF);
    }
  }
  constexpr int per_vector = P == kLanes / 2 ? 2 : 1;
  if (units == kLanes && (per_vector == 1 || second_panel)) {
#pragma GCC unroll 16
    for (int u = 0; u < kLanes; ++u) {
      float* to = per_vector == 1 ? out + u * P : out + u % 2 * panel + u / 2 * kLanes;
      store(to, block[u]);
    }
    return;
  }
  vfloat edge[kLanes];  // a copy: a block that is indexed by a variable would live in memory always
#pragma GCC unroll 16
  for (int u = 0; u < kLanes; ++u) edge[u] = block[u];
  for (int u = 0; u < units; u += per_vector) {
    const int bytes = (units - u < per_vector ? P : kLanes) * 4;
    std::memcpy(out + u * P, &edge[u], bytes);
    if (per_vector == 2 && second_panel) std::memcpy(out + panel + u * P, &edge[u + 1], bytes);
  }
}

// `multiple`: of how many units a panel is made, zeros at the end.
template <class Source, bool pairs, int P, int multiple>
void pack_from(const GemmSource& s, float* packed) {
  static_assert(P % kLanes == 0 || P == kLanes / 2, "kLanes rows are a part of a panel, or two panels");
  constexpr int per_unit = pairs ? 2 : 1;
  constexpr int per_multiple = per_unit * multiple;
  const int64_t units = (s.k + per_multiple - 1) / per_multiple * multiple, padded = (s.rows + P - 1) / P * P;
  const typename Source::Type* x = (const typename Source::Type*)s.data;
  for (int64_t i = 0; i < padded; i += kLanes) {
    for (int64_t u = 0; u < units; u += kLanes) {
      vfloat block[kLanes];
      load_units<Source, pairs>(x + i * s.row_stride + u * per_unit * s.k_stride, s, s.rows - i, s.k - u * per_unit,
                                block);
      store_units<P>(block, units - u < kLanes ? units - u : kLanes, i + P < padded,
                     packed + i / P * P * units + u * P + i % P, P * units);
    }
  }
}

template <bool pairs, int P, int multiple = 1>
void pack(const GemmSource& s, void* packed) {
  float* out = (float*)packed;
  switch (s.element) {
    case 0:
      return pack_from<Float32, pairs, P, multiple>(s, out);
    case 1:
      return pack_from<BFloat16, pairs, P, multiple>(s, out);
    case 2:
      return pack_from<Float16, pairs, P, multiple>(s, out);
    default:
      return pack_from<LowPart, pairs, P, multiple>(s, out);
  }
}

template <bool pairs, int P>
int64_t packed_bytes(int64_t rows, int64_t k) {
  return (rows + P - 1) / P * P * (pairs ? (k + 1) / 2 : k) * 4;
}

}  // namespace
}  // namespace fastkd
