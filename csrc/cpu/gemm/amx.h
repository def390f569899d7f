// AMX for gemm/gemm_isa.cpp. OFF BY DEFAULT AND NEVER RUN ON HARDWARE: no machine with AMX was at hand when it was
// written. FASTKD_AMX=1 in the environment switches it on where the processor and the kernel allow it.
//
// What is tested is everything but the intrinsics: the same packing and the same macro tile with `emulated_tiles`,
// which does in C++ what hardware_tiles asks the tile registers to do (gemm_nt with EMULATE_AMX, tests/test_gemm.py).
//
// A block is 32 values of k (16 units), zeros beyond k. Panels are 32 rows: of A unit[blocks][32 rows][16], rows as the
// tile registers want them; of B unit[blocks][16][32 rows], the layout of the vector units, 2 KiB per block each.
#pragma once
#include "cpu/gemm/pack.h"
#include "cpu/gemm/write.h"

#if defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTKD_AMX_COMPILED
#include <immintrin.h>
#endif

namespace fastkd {
namespace {

constexpr int AMX_ROWS = 32, AMX_UNITS = 16, AMX_BYTES = 2048;  // of a panel; of a block; of a block of a panel
constexpr int64_t AMX_BLOCKS = 32;                              // of k at a time

// sums[32][32] = the product of a panel of A and a panel of B over some blocks.
typedef void AmxProduct(const char* a, const char* b, int64_t blocks, float* sums);

void emulated_tiles(const char* a, const char* b, int64_t blocks, float* sums) {
  std::memset(sums, 0, AMX_ROWS * AMX_ROWS * 4);
  for (int64_t block = 0; block < blocks; ++block, a += AMX_BYTES, b += AMX_BYTES)
    for (int i = 0; i < AMX_ROWS; ++i)
      for (int u = 0; u < AMX_UNITS; ++u)
        for (int j = 0; j < AMX_ROWS; ++j) {
          uint32_t x, y;
          std::memcpy(&x, a + (i * AMX_UNITS + u) * 4, 4);
          std::memcpy(&y, b + (u * AMX_ROWS + j) * 4, 4);
          const uint32_t parts[4] = {x << 16, y << 16, x & 0xffff0000u, y & 0xffff0000u};
          float f[4];
          std::memcpy(f, parts, 16);
          sums[i * AMX_ROWS + j] += f[0] * f[1] + f[2] * f[3];
        }
}

struct NoConfiguration {
  NoConfiguration() {}
  ~NoConfiguration() {}
};

#if defined(FASTKD_AMX_COMPILED)
#define FASTKD_AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

// Eight tiles of 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 of A, 6 and 7 of B.
struct TileConfiguration {
  FASTKD_AMX_TARGET TileConfiguration() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } tiles = {};
    tiles.palette = 1;
    for (int i = 0; i < 8; ++i) tiles.row_bytes[i] = 64, tiles.rows[i] = 16;
    asm volatile("" ::"r"(&tiles)
                 : "memory");  // gcc 12 drops the stores otherwise, and the load is an illegal instruction
    _tile_loadconfig(&tiles);
  }
  FASTKD_AMX_TARGET ~TileConfiguration() { _tile_release(); }
};

FASTKD_AMX_TARGET void hardware_tiles(const char* a, const char* b, int64_t blocks, float* sums) {
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < blocks; ++block, a += AMX_BYTES, b += AMX_BYTES) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + 1024, 64);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * AMX_ROWS, 128);
  _tile_stored(3, sums + 16 * AMX_ROWS + 16, 128);
  asm volatile("" ::: "memory");
}
#endif

int64_t amx_bytes(int64_t rows, int64_t k) {
  return (rows + AMX_ROWS - 1) / AMX_ROWS * ((k + 2 * AMX_UNITS - 1) / (2 * AMX_UNITS)) * AMX_BYTES;
}

template <class Source>
void amx_pack_a_from(const GemmSource& s, float* packed) {
  const int64_t units = (s.k + 2 * AMX_UNITS - 1) / (2 * AMX_UNITS) * AMX_UNITS;
  const int64_t padded = (s.rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS;
  const typename Source::Type* x = (const typename Source::Type*)s.data;
  for (int64_t i = 0; i < padded; i += kLanes) {
    for (int64_t u = 0; u < units; u += kLanes) {
      vfloat block[kLanes];
      load_units<Source, true>(x + i * s.row_stride + 2 * u * s.k_stride, s, s.rows - i, s.k - 2 * u, block);
      transpose(block);  // now rows of units
      float* out = packed + i / AMX_ROWS * AMX_ROWS * units + u / AMX_UNITS * AMX_ROWS * AMX_UNITS;
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(out + (i % AMX_ROWS + r) * AMX_UNITS + u % AMX_UNITS, block[r]);
    }
  }
}

void amx_pack_a(const GemmSource& s, void* packed) {
  float* out = (float*)packed;
  switch (s.element) {
    case 0:
      return amx_pack_a_from<Float32>(s, out);
    case 1:
      return amx_pack_a_from<BFloat16>(s, out);
    case 2:
      return amx_pack_a_from<Float16>(s, out);
    default:
      return amx_pack_a_from<LowPart>(s, out);
  }
}

// One panel of A over some blocks of k, against every panel of B.
template <AmxProduct* product>
void amx_strip(const char* a, const char* b, int64_t blocks, int64_t blocks_of_b, int64_t n, Corner at) {
  alignas(64) float sums[AMX_ROWS * AMX_ROWS];
  float* const first = at.c;
  for (int64_t j = 0; j < n; j += AMX_ROWS) {
    product(a, b + j / AMX_ROWS * blocks_of_b * AMX_BYTES, blocks, sums);
    at.c = first + j;
    at.columns = n - j < AMX_ROWS ? n - j : AMX_ROWS;
    write_sums(sums, AMX_ROWS, at);
  }
}

// A where it lies is packed here, a strip at a time, on the stack.
template <AmxProduct* product, class Configuration, bool direct>
void amx_blocked(const void* a, int64_t row_stride, const void* b, const GemmShape& s, const GemmOut& out) {
  const Configuration configuration;
  const int64_t blocks = (s.k + 2 * AMX_UNITS - 1) / (2 * AMX_UNITS);
  alignas(64) char strip[AMX_BLOCKS * AMX_BYTES];
  int64_t p = 0;
  do {  // once even where k = 0: the zeros must be written
    const int64_t some = blocks - p < AMX_BLOCKS ? blocks - p : AMX_BLOCKS, k = p * 2 * AMX_UNITS;
    for (int64_t i = 0; i < s.m; i += AMX_ROWS) {
      const int64_t rows = s.m - i < AMX_ROWS ? s.m - i : AMX_ROWS;
      const char* left = (const char*)a + (i / AMX_ROWS * blocks + p) * AMX_BYTES;
      if (direct) {
        const int64_t depth = s.k - k < some * 2 * AMX_UNITS ? s.k - k : some * 2 * AMX_UNITS;
        amx_pack_a({(const uint16_t*)a + i * row_stride + k, 1, row_stride, 1, rows, depth}, strip);
        left = strip;
      }
      amx_strip<product>(left, (const char*)b + p * AMX_BYTES, some, blocks, s.n,
                         {out.data + i * out.row_stride, out.row_stride, rows, 0, out.alpha, out.accumulate || p > 0});
    }
    p += AMX_BLOCKS;
  } while (p < blocks);
}

template <AmxProduct* product, class Configuration>
void amx_tile(const void* a, const void* b, const GemmShape& shape, const GemmOut& out) {
  amx_blocked<product, Configuration, false>(a, 0, b, shape, out);
}

template <AmxProduct* product, class Configuration>
constexpr Gemm amx_implementation() {
  return {1,
          AMX_ROWS,
          AMX_ROWS,
          amx_bytes,
          amx_bytes,
          amx_pack_a,
          pack<true, AMX_ROWS, AMX_UNITS>,
          amx_tile<product, Configuration>,
          amx_blocked<product, Configuration, true>};
}

}  // namespace
}  // namespace fastkd
