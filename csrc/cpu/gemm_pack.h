// Packing for gemm_isa.cpp: rows of any type and stride into panels of 32-bit units.
//
// A unit is one float32, or two bfloat16 neighbours in k (an odd k ends with a zero). A panel of P rows is
// unit[ceil(k / per unit)][P]. Everything is done on blocks of W rows by W units, W being the lanes of a vector.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/gemm.h"

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(W * 2), aligned(2), may_alias));

inline __attribute__((always_inline)) Words words(Floats x) { return (Words)x; }
inline __attribute__((always_inline)) Floats floats(Words x) { return (Floats)x; }

// Round to nearest even; the upper half of each word is the bfloat16. A NaN keeps its upper half and becomes quiet.
inline __attribute__((always_inline)) Words bfloat16_bits(Floats x) {
  const Words u = words(x), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Words nan = (Words)(x != x);
  return ((rounded & ~nan) | ((u | 0x400000u) & nan)) & 0xffff0000u;
}

// W elements of a type, as float32.
struct Float32 {
  static constexpr bool pairs_as_it_lies = false;
  typedef float Type;
  static inline __attribute__((always_inline)) Floats load(const float* x) { return *(const Floats*)x; }
};
struct BFloat16 {
  static constexpr bool pairs_as_it_lies = true;
  typedef uint16_t Type;
  static inline __attribute__((always_inline)) Floats load(const uint16_t* x) {
    return floats(__builtin_convertvector(*(const Halves*)x, Words) << 16);
  }
};
struct Float16 {
  static constexpr bool pairs_as_it_lies = false;
  typedef uint16_t Type;
  static inline __attribute__((always_inline)) Floats load(const uint16_t* x) {
    const Words u = __builtin_convertvector(*(const Halves*)x, Words), exponent = u & 0x7c00u;
    const Words finite = words(floats((u & 0x7fffu) << 13) * 0x1p112f);  // subnormals come out right as well
    const Words special = (Words)(exponent == 0x7c00u);
    return floats(finite | (special & 0x7f800000u) | ((u & 0x8000u) << 16));
  }
};
struct LowPart {
  static constexpr bool pairs_as_it_lies = false;
  typedef float Type;
  static inline __attribute__((always_inline)) Floats load(const float* x) {
    const Floats value = *(const Floats*)x;
    return value - floats(bfloat16_bits(value));
  }
};

#if defined(__clang__)
template <int... i>
struct Lanes {};
template <int n, int... i>
struct Count : Count<n - 1, n - 1, i...> {};
template <int... i>
struct Count<0, i...> {
  typedef Lanes<i...> Type;
};
template <int... i>
inline __attribute__((always_inline)) void interleave(Floats a, Floats b, Floats* out, Lanes<i...>) {
  const Floats low = __builtin_shufflevector(a, b, (i / 2 + (i % 2) * W)...);
  out[1] = __builtin_shufflevector(a, b, (W / 2 + i / 2 + (i % 2) * W)...);
  out[0] = low;
}
inline __attribute__((always_inline)) void interleave(Floats a, Floats b, Floats* out) {
  interleave(a, b, out, typename Count<W>::Type{});
}
#else
inline __attribute__((always_inline)) void interleave(Floats a, Floats b, Floats* out) {
  Words low, high;
  for (int i = 0; i < W; ++i) low[i] = i / 2 + (i % 2) * W, high[i] = W / 2 + i / 2 + (i % 2) * W;
  out[0] = __builtin_shuffle(a, b, low);
  out[1] = __builtin_shuffle(a, b, high);
}
#endif

// log2(W) perfect shuffles of the rows are a transposition.
inline __attribute__((always_inline)) void transpose(Floats (&x)[W]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    Floats y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) interleave(x[i], x[i + W / 2], y + 2 * i);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// Where neither direction is contiguous, or the block is not whole: element by element through memory.
template <class Source>
void gather_floats(const typename Source::Type* x, const GemmSource& s, int64_t rows, int64_t k, Floats (&out)[W]) {
  typename Source::Type block[W * W];
  std::memset(block, 0, sizeof block);  // [k][rows]; zero bits are 0 in every type
  rows = rows < W ? rows : W, k = k < W ? k : W;
  for (int64_t p = 0; p < k; ++p)
    for (int64_t i = 0; i < rows; ++i) block[p * W + i] = x[i * s.row_stride + p * s.k_stride];
  for (int p = 0; p < W; ++p) out[p] = Source::load(block + p * W);
}

// out[p] = x[0:W, p] for W values of p; rows and k say how many there are, the others are 0.
template <class Source>
inline __attribute__((always_inline)) void load_floats(const typename Source::Type* x, const GemmSource& s,
                                                       int64_t rows, int64_t k, Floats (&out)[W]) {
  if (s.k_stride == 1 && k >= W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) out[i] = i < rows ? Source::load(x + i * s.row_stride) : Floats{};
    transpose(out);
  } else if (s.row_stride == 1 && rows >= W && k >= W) {
#pragma GCC unroll 16
    for (int p = 0; p < W; ++p) out[p] = Source::load(x + p * s.k_stride);
  } else {
    gather_floats<Source>(x, s, rows, k, out);
  }
}

// out[u] = units u of W rows.
template <class Source, bool pairs>
inline __attribute__((always_inline)) void load_units(const typename Source::Type* x, const GemmSource& s, int64_t rows,
                                                      int64_t k, Floats (&out)[W]) {
  if constexpr (!pairs) {
    load_floats<Source>(x, s, rows, k, out);
  } else {
    if constexpr (Source::pairs_as_it_lies) {
      if (s.k_stride == 1 && k >= 2 * W) {  // two neighbours are a unit already
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) out[i] = i < rows ? *(const Floats*)(x + i * s.row_stride) : Floats{};
        return transpose(out);
      }
    }
    for (int half = 0; half < 2; ++half) {
      Floats part[W];
      load_floats<Source>(x + half * W * s.k_stride, s, rows, k - half * W, part);
      for (int u = 0; u < W / 2; ++u)
        out[half * (W / 2) + u] = floats((bfloat16_bits(part[2 * u]) >> 16) | bfloat16_bits(part[2 * u + 1]));
    }
  }
}

template <class Source, bool pairs, int P>
void pack_from(const GemmSource& s, float* packed) {
  static_assert(P % W == 0 || W % P == 0, "a block of rows is a part of a panel, or several panels");
  constexpr int piece = P < W ? P : W, per_unit = pairs ? 2 : 1;
  const int64_t units = (s.k + per_unit - 1) / per_unit, padded = (s.rows + P - 1) / P * P;
  const typename Source::Type* x = (const typename Source::Type*)s.data;
  for (int64_t i = 0; i < padded; i += W) {
    for (int64_t u = 0; u < units; u += W) {
      Floats block[W];
      const int64_t k = s.k - u * per_unit, whole = units - u < W ? units - u : W;
      load_units<Source, pairs>(x + i * s.row_stride + u * per_unit * s.k_stride, s, s.rows - i, k, block);
#pragma GCC unroll 4
      for (int part = 0; part < W / piece; ++part) {
        const int64_t j = i + part * piece;
        if (j >= padded) break;
        float* out = packed + j / P * P * units + u * P + j % P;
#pragma GCC unroll 16
        for (int v = 0; v < W; ++v)
          if (v < whole) std::memcpy(out + v * P, (const char*)&block[v] + part * piece * 4, piece * 4);
      }
    }
  }
}

template <bool pairs, int P>
void pack(const GemmSource& s, void* packed) {
  float* out = (float*)packed;
  switch (s.element) {
    case 0:
      return pack_from<Float32, pairs, P>(s, out);
    case 1:
      return pack_from<BFloat16, pairs, P>(s, out);
    case 2:
      return pack_from<Float16, pairs, P>(s, out);
    default:
      return pack_from<LowPart, pairs, P>(s, out);
  }
}

template <bool pairs, int P>
int64_t packed_bytes(int64_t rows, int64_t k) {
  return (rows + P - 1) / P * P * (pairs ? (k + 1) / 2 : k) * 4;
}

}  // namespace
