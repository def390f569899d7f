// A row of the bank as floats, whatever its dtype. Only for *_isa.cpp units (cpu/simd/vec.h).
#pragma once
#include <cmath>

#include "cpu/contrast/op.h"
#include "cpu/simd/vec.h"

namespace fastkd::contrast {

namespace {

typedef uint8_t vbytes __attribute__((vector_size(kLanes)));

// e4m3fn: s eeee mmm, bias 7; no infinity, NaN where all of e and m are set.
inline vfloat from_float8(const uint8_t* x) {
  vbytes bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  const vint byte = __builtin_convertvector(bytes, vint), rest = byte & 0x7f, sign = (byte & 0x80) << 24;
  const vint normal = (rest << 20) + (120 << 23);
  const vint small = bits(__builtin_convertvector(rest, vfloat) * 0.001953125f);  // in steps of 2^-9
  const vint finite = rest < 8 ? small : normal;
  return from_bits((rest == 0x7f ? vint{} + 0x7fc00000 : finite) | sign);
}

// |x| <= 448, to nearest, ties to even. Below 2^-6 the type's numbers lie 2^-9 apart, as float32's do from 2^14 on.
inline void narrow_float8(const float* in, uint8_t* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(in[i]), shifted = size + 16384.f;
    uint32_t wide, small, word;
    std::memcpy(&wide, in + i, 4), std::memcpy(&word, &size, 4), std::memcpy(&small, &shifted, 4);
    const uint32_t normal = ((word + 0x7ffff + ((word >> 20) & 1)) >> 20) - (120u << 3);
    const uint32_t code = size < 0.015625f ? small - 0x46800000u : normal;
    out[i] = uint8_t((code < 0x7e ? code : 0x7eu) | ((wide >> 24) & 0x80));
  }
}

inline void widen_row(const void* x, int element, int64_t count, float scale, float* out) {
  if (element == kFloat8) {
    const uint8_t* from = static_cast<const uint8_t*>(x);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, from_float8(from + i) * scale);
    if (i < count) {
      uint8_t rest[kLanes] = {};
      std::memcpy(rest, from + i, count - i);
      store_some(out + i, from_float8(rest) * scale, int(count - i));
    }
    return;
  }
  if (element == 0)
    std::memcpy(out, x, count * sizeof(float));
  else
    as_floats(x, element, out, count);
  if (scale != 1)
    for (int64_t i = 0; i < count; ++i) out[i] *= scale;
}

}  // namespace

}  // namespace fastkd::contrast
