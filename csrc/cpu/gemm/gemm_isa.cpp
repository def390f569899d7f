// The macro tile and its microkernels. C is computed in register tiles of MR rows of A by NV vectors of rows of B: one
// broadcast unit of A times NV vectors of B per row and unit of k.
//
// Blocking: KC units of k at a time, so that a panel of A stays in L1 while the panels of B stream from L2; NC rows of
// B at a time, so that they stay in L2. Sums over k run in the same order whatever the tile, hence the bitwise promise
// of gemm/gemm.h.
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/pack.h"
#include "cpu/gemm/write.h"
#include "cpu/simd/isa.h"

namespace fastkd {
namespace {

#ifndef FASTKD_GEMM_MR
#if defined(__AVX512F__)
#define FASTKD_GEMM_MR 8
#define FASTKD_GEMM_NV 2
#elif defined(__AVX2__)
#define FASTKD_GEMM_MR 4
#define FASTKD_GEMM_NV 3
#else
#define FASTKD_GEMM_MR 4
#define FASTKD_GEMM_NV 2
#endif
#endif
#ifndef FASTKD_GEMM_KC
#define FASTKD_GEMM_KC 256
#define FASTKD_GEMM_NC 512
#endif
constexpr int MR = FASTKD_GEMM_MR, NV = FASTKD_GEMM_NV, NR = NV * kLanes;
constexpr int64_t KC = FASTKD_GEMM_KC, NC = FASTKD_GEMM_NC / NR * NR;

struct MultiplyFloat32 {
  static constexpr int per_unit = 1;
  static FASTKD_INLINE vfloat broadcast(const char* unit) {
    float x;
    std::memcpy(&x, unit, 4);
    return x - vfloat{};
  }
  static FASTKD_INLINE vfloat step(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }
};

#if defined(__AVX512F__)
struct MultiplyBFloat16 {
  static constexpr int per_unit = 2;
  static FASTKD_INLINE vfloat broadcast(const char* unit) {
    uint32_t x;
    std::memcpy(&x, unit, 4);
    return (vfloat)(x + vuint{});
  }
  // By assembly, because this unit is compiled for machines without the instruction too; gemm() keeps them away.
  static FASTKD_INLINE vfloat step(vfloat sum, vfloat a, vfloat b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

template <int vectors>
FASTKD_INLINE void write(const vfloat (&sum)[MR][vectors], const Corner& at) {
  if (at.rows == MR && at.columns == vectors * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) write_vector(at.c + i * at.row_stride + v * kLanes, sum[i][v], at);
    }
    return;
  }
  float edge[MR * vectors * kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(edge + (i * vectors + v) * kLanes, sum[i][v]);
  }
  write_sums(edge, vectors * kLanes, at);
}

// A packed: unit[units][MR].
template <class Multiply, int vectors>
void packed_kernel(const char* a, const float* b, int64_t units, const Corner& at) {
  vfloat sum[MR][vectors] = {};
  for (int64_t p = 0; p < units; ++p, a += MR * 4, b += NR) {
    vfloat right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vfloat left = Multiply::broadcast(a + i * 4);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Multiply::step(sum[i][v], left, right[v]);
    }
  }
  write<vectors>(sum, at);
}

// A where it lies. Rows beyond the last one are read from the last one, and not stored. `ahead`: how far behind these
// rows those lie that are read next, to be fetched meanwhile (behind the last ones too: nothing faults); 0: not yet.
template <class Multiply, int vectors>
void direct_kernel(const char* a, int64_t row_bytes, int64_t ahead, const float* b, int64_t k, const Corner& at) {
  vfloat sum[MR][vectors] = {};
  const char* row[MR];
  for (int i = 0; i < MR; ++i) row[i] = a + (i < at.rows ? i : at.rows - 1) * row_bytes;
  const int64_t whole = k / Multiply::per_unit;
  for (int64_t p = 0; p < whole; ++p, b += NR) {
    vfloat right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(b + v * kLanes);
    if (ahead && p % 16 == 0) {  // a line of each
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) __builtin_prefetch(row[i] + ahead + p * 4);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vfloat left = Multiply::broadcast(row[i] + p * 4);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Multiply::step(sum[i][v], left, right[v]);
    }
  }
  if (whole * Multiply::per_unit < k) {  // half a unit: what follows it in memory is not ours
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      char unit[4] = {};
      std::memcpy(unit, row[i] + whole * 4, 2);
      const vfloat left = Multiply::broadcast(unit);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Multiply::step(sum[i][v], left, load(b + v * kLanes));
    }
  }
  write<vectors>(sum, at);
}

template <class Multiply, bool direct>
FASTKD_INLINE void register_tile(const char* a, int64_t row_bytes, int64_t ahead, const float* b, int64_t k,
                                 const Corner& at) {
  const int64_t units = (k + Multiply::per_unit - 1) / Multiply::per_unit;
#define FASTKD_GEMM_KERNEL(vectors)                                             \
  if constexpr (vectors <= NV) {                                                \
    if (at.columns > (vectors - 1) * kLanes) {                                  \
      if constexpr (direct)                                                     \
        return direct_kernel<Multiply, vectors>(a, row_bytes, ahead, b, k, at); \
      else                                                                      \
        return packed_kernel<Multiply, vectors>(a, b, units, at);               \
    }                                                                           \
  }
  FASTKD_GEMM_KERNEL(3)
  FASTKD_GEMM_KERNEL(2)
  FASTKD_GEMM_KERNEL(1)
#undef FASTKD_GEMM_KERNEL
}

template <class Multiply, bool direct>
void blocked(const char* a, int64_t row_bytes, const float* b, const GemmShape& s, const GemmOut& out) {
  const int64_t per_unit = Multiply::per_unit, units = (s.k + per_unit - 1) / per_unit, step = KC * per_unit;
  int64_t p = 0;
  do {  // once even where k = 0: the zeros must be written
    const int64_t k = s.k - p < step ? s.k - p : step, u = p / per_unit;
    for (int64_t jc = 0; jc < s.n; jc += NC) {
      const int64_t end = s.n - jc < NC ? s.n : jc + NC;
      for (int64_t i = 0; i < s.m; i += MR) {
        const char* left = direct ? a + i * row_bytes + u * 4 : a + (i * units + u * MR) * 4;
        const int64_t rows = s.m - i < MR ? s.m - i : MR;
        for (int64_t j = jc; j < end; j += NR) {
          const int64_t columns = end - j < NR ? end - j : NR, ahead = j + NR < end ? 0 : MR * row_bytes;
          const Corner at = {
              out.data + i * out.row_stride + j, out.row_stride, rows, columns, out.alpha, out.accumulate || p > 0};
          register_tile<Multiply, direct>(left, row_bytes, ahead, b + j * units + u * NR, k, at);
        }
      }
    }
    p += step;
  } while (p < s.k);
}

template <class Multiply>
void tile(const void* a, const void* b, const GemmShape& shape, const GemmOut& out) {
  blocked<Multiply, false>((const char*)a, 0, (const float*)b, shape, out);
}

template <class Multiply>
void tile_direct(const void* a, int64_t row_stride, const void* b, const GemmShape& shape, const GemmOut& out) {
  blocked<Multiply, true>((const char*)a, row_stride * 4 / Multiply::per_unit, (const float*)b, shape, out);
}

template <class Multiply>
constexpr Gemm implementation() {
  constexpr bool pairs = Multiply::per_unit == 2;
  return {pairs,
          MR,
          NR,
          packed_bytes<pairs, MR>,
          packed_bytes<pairs, NR>,
          pack<pairs, MR>,
          pack<pairs, NR>,
          tile<Multiply>,
          tile_direct<Multiply>};
}

#if defined(__AVX512F__)
constexpr Gemm bfloat16 = implementation<MultiplyBFloat16>();
#else
constexpr Gemm bfloat16 = {};
#endif

}  // namespace

const GemmTable FASTKD_TABLE(gemm_table) = {implementation<MultiplyFloat32>(), bfloat16};

}  // namespace fastkd
