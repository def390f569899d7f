// A row of the bank as floats, whatever it is kept in. Only for *_isa.cpp units (cpu/vec.h).
#pragma once

#include "cpu/contrast.h"
#include "cpu/vec.h"

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
