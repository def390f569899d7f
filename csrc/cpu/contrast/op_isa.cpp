// A block of the bank against a panel of queries: scores to weights, and the weighted sum of the bank's rows.
//
// Scores come transposed, [keys][kPanel], so that everything between the two products is lane by lane: the largest
// score, the exponentials, their sum, and the pairs of neighbouring keys that bfloat16 units multiply.
#include "cpu/contrast/op.h"

#include <algorithm>
#include <cmath>

#include "cpu/contrast/widen.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2, kColumns = kVectors * kLanes;
static_assert(kPanel % kLanes == 0 && kPanel % kRows == 0 && kColumnStep % kColumns == 0, "panels are whole");

void exclude_ids(float* scores, int64_t keys, int64_t queries, const int64_t* query_ids, const int64_t* bank_ids) {
  for (int64_t j = 0; j < keys; ++j, scores += kPanel) {
    const int64_t id = bank_ids[j];
#pragma omp simd
    for (int64_t i = 0; i < queries; ++i) scores[i] = query_ids[i] == id ? -kInfinity : scores[i];
  }
}

void scale_row(float* x, int64_t count, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

inline vfloat largest_of(const float* scores, int64_t keys, vfloat start) {
  vfloat top[4] = {start, start, start, start};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
    for (int c = 0; c < 4; ++c) top[c] = larger(top[c], load(scores + (j + c) * kPanel));
  for (; j < keys; ++j) top[0] = larger(top[0], load(scores + j * kPanel));
  return larger(larger(top[0], top[1]), larger(top[2], top[3]));
}

inline void store_pairs(uint32_t* out, vint first, vint second) {  // bits of bfloat16 in the upper halves
  const vint both = ((first >> 16) & 0xffff) | second;
  std::memcpy(out, &both, sizeof both);
}

// Two neighbouring keys; an odd last one has no second.
inline vfloat weigh_keys(float* scores, bool second, vfloat shift, uint32_t* high, uint32_t* low) {
  const vfloat a = exp(load(scores) - shift), b = second ? exp(load(scores + kPanel) - shift) : vfloat{};
  if (!high) {
    store(scores, a);
    if (second) store(scores + kPanel, b);
    return a + b;
  }
  const vint high_a = (vint)bfloat16_bits(a), high_b = (vint)bfloat16_bits(b);
  store_pairs(high, high_a, high_b);
  if (low) store_pairs(low, (vint)bfloat16_bits(a - from_bits(high_a)), (vint)bfloat16_bits(b - from_bits(high_b)));
  return a + b;
}

void softmax_weights(float* scores, int64_t keys, int64_t queries, PanelState* state, uint32_t* high, uint32_t* low) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    const vfloat before = load(state->largest + i), top = largest_of(scores + i, keys, before);
    const vfloat shift = top == -kInfinity ? vfloat{} : top;  // nothing but excluded keys so far: weights 0, not NaN
    const vfloat shrink = exp(before - shift);
    vfloat total[2] = {};
    for (int64_t j = 0; j < keys; j += 2) {
      const int64_t unit = j / 2 * kPanel + i;
      total[j / 2 % 2] += weigh_keys(scores + j * kPanel + i, j + 1 < keys, shift, high ? high + unit : nullptr,
                                     low ? low + unit : nullptr);
    }
    float sums[kLanes];
    store(sums, total[0] + total[1]);
    store(state->largest + i, top);
    store(state->shrink + i, shrink);
    for (int l = 0; l < kLanes; ++l) state->sum[i + l] = state->sum[i + l] * state->shrink[i + l] + sums[l];
  }
}

inline void add_tile(const vfloat (&sum)[kRows][kVectors], const float* shrink, int64_t width, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      float* at = out + i * width + v * kLanes;
      store(at, load(at) * shrink[i] + sum[i][v]);
    }
}

// Which rows of the next block a group of queries fetches: every (mask + 1)-th, from `phase` on. All of them at once
// would ask for more than memory gives in that time.
struct Fetch {
  int64_t mask, phase;
  bool some() const { return phase <= mask; }
  bool now(int64_t step) const { return (step & mask) == phase; }
};

inline Fetch fetch(bool ahead, int64_t first, int64_t queries) {
  const int64_t groups = (queries + kRows - 1) / kRows;
  return {!ahead ? -1 : groups >= 4 ? 3 : groups >= 2 ? 1 : 0, first / kRows};
}

template <bool kAhead>
void sum_tile(const float* weights, const float* bank, int64_t row_stride, int64_t keys, Fetch fetch,
              const float* shrink, int64_t width, float* out) {
  vfloat sum[kRows][kVectors] = {};
  const int64_t next = keys * row_stride;
  for (int64_t j = 0; j < keys; ++j, weights += kPanel, bank += row_stride) {
    if (kAhead && fetch.now(j)) {
      __builtin_prefetch(bank + next, 0, 2);
      __builtin_prefetch(bank + next + 16, 0, 2);
    }
    vfloat right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(bank + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += right[v] * weights[i];
  }
  add_tile(sum, shrink, width, out);
}

void weighted_sum(const float* weights, const float* bank, int64_t row_stride, int64_t keys, int64_t queries,
                  int64_t width, const float* shrink, float* out, bool ahead) {
  for (int64_t i = 0; i < queries; i += kRows) {
    const Fetch next = fetch(ahead, i, queries);
    for (int64_t d = 0; d < width; d += kColumns)
      (next.some() ? sum_tile<true> : sum_tile<false>)(weights + i, bank + d, row_stride, keys, next, shrink + i, width,
                                                       out + i * width + d);
  }
}

#if defined(__AVX512F__)
// Units of two keys: their rows are interleaved on the way in.
struct Interleave {
  __m512i low, high;
  Interleave() {
    uint16_t order[64];
    for (int i = 0; i < 32; ++i) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(32 + i);
    low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + 32);
  }
};

inline void multiply(vfloat& sum, uint32_t unit, __m512i right) {
  const __m512i left = _mm512_set1_epi32(int(unit));
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
}

template <bool kLow, bool kAhead>
void sum_tile_bfloat16(const uint32_t* high, const uint32_t* low, const uint16_t* bank, int64_t row_stride,
                       int64_t keys, Fetch fetch, const float* shrink, int64_t width, float* out) {
  const Interleave order;
  vfloat sum[kRows][kVectors] = {};
  const int64_t next = keys * row_stride;
  for (int64_t j = 0; j < keys; j += 2, bank += 2 * row_stride) {
    if (kAhead && fetch.now(j / 2)) {
      __builtin_prefetch(bank + next, 0, 2);
      __builtin_prefetch(bank + next + row_stride, 0, 2);
    }
    const __m512i first = _mm512_loadu_si512(bank);
    const __m512i second = j + 1 < keys ? _mm512_loadu_si512(bank + row_stride) : _mm512_setzero_si512();
    const __m512i right[kVectors] = {_mm512_permutex2var_epi16(first, order.low, second),
                                     _mm512_permutex2var_epi16(first, order.high, second)};
    const int64_t unit = j / 2 * kPanel;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) multiply(sum[i][v], high[unit + i], right[v]);
      if constexpr (kLow)
        for (int v = 0; v < kVectors; ++v) multiply(sum[i][v], low[unit + i], right[v]);
    }
  }
  add_tile(sum, shrink, width, out);
}

void weighted_sum_bfloat16(const uint32_t* high, const uint32_t* low, const uint16_t* bank, int64_t row_stride,
                           int64_t keys, int64_t queries, int64_t width, const float* shrink, float* out, bool ahead) {
  for (int64_t i = 0; i < queries; i += kRows) {
    const Fetch next = fetch(ahead, i, queries);
    for (int64_t d = 0; d < width; d += kColumns) {
      const auto tile = low ? (next.some() ? sum_tile_bfloat16<true, true> : sum_tile_bfloat16<true, false>)
                            : (next.some() ? sum_tile_bfloat16<false, true> : sum_tile_bfloat16<false, false>);
      tile(high + i, low ? low + i : nullptr, bank + d, row_stride, keys, next, shrink + i, width, out + i * width + d);
    }
  }
}
#else
constexpr decltype(Table::weighted_sum_bfloat16) weighted_sum_bfloat16 = nullptr;
#endif

double exponentials(float* x, int64_t keys, float alpha, const int64_t* ids, int64_t own, float* largest) {
  constexpr int64_t kBlock = 64 * kLanes;  // of it the sum is single precision
  if (ids) {
#pragma omp simd
    for (int64_t k = 0; k < keys; ++k) x[k] = ids[k] == own ? -kInfinity : x[k] * alpha;
  } else {
    scale_row(x, keys, alpha);
  }
  const int64_t whole = keys / kLanes * kLanes;
  const int rest = int(keys - whole);
  vfloat top = rest ? load_some(x + whole, rest, -kInfinity) : splat(-kInfinity);
  for (int64_t k = 0; k < whole; k += kLanes) top = larger(top, load(x + k));
  *largest = max_lanes(top);
  const vfloat shift = splat(*largest == -kInfinity ? 0 : *largest);  // nothing but excluded keys: 0, not NaN
  double total = 0;
  for (int64_t first = 0; first < whole; first += kBlock) {
    vfloat sum = {};
    for (int64_t k = first; k < std::min(whole, first + kBlock); k += kLanes) {
      const vfloat e = exp(load(x + k) - shift);
      store(x + k, e);
      sum += e;
    }
    total += sum_lanes(wide(sum));
  }
  if (!rest) return total;
  const vfloat e = exp(load_some(x + whole, rest, -kInfinity) - shift);
  store_some(x + whole, e, rest);
  return total + sum_lanes(wide(e));
}

void add_scaled_row(const float* x, float scale, int64_t count, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += scale * x[i];
}

void to_float32(const void* x, int element, int64_t count, int64_t padded, float scale, float* out) {
  widen_row(x, element, count, scale, out);
  for (int64_t i = count; i < padded; ++i) out[i] = 0;
}

constexpr float kLargestFloat8 = 448;

// A row in 8 bits, and the factor that makes its largest element the type's largest.
void store_float8(float* row, int64_t width, uint8_t* out, float* scale) {
  float largest = 1e-12f;
  for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(row[i]));
  *scale = largest / kLargestFloat8;
  for (int64_t i = 0; i < width; ++i) row[i] = std::min(std::max(row[i] / *scale, -kLargestFloat8), kLargestFloat8);
  narrow_float8(row, out, width);
}

void update_row(void* bank, int bank_element, float* factor, const void* row, int row_element, int64_t width,
                double momentum, float* scratch) {
  float *old = scratch, *now = scratch + width;
  const float keep = float(momentum), take = float(1 - momentum);
  to_float32(bank, bank_element, width, width, factor ? *factor : 1, old);
  to_float32(row, row_element, width, width, 1, now);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) {
    now[i] = keep * old[i] + take * now[i];
    sum += double(now[i]) * double(now[i]);
  }
  const double norm = std::sqrt(sum);
  if (!(norm < double(kInfinity))) return;
  const float scale = float(1 / (norm > 1e-12 ? norm : 1e-12));
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) now[i] *= scale;
  if (factor)
    store_float8(now, width, static_cast<uint8_t*>(bank), factor);
  else if (bank_element == 0)
    std::memcpy(bank, now, width * sizeof(float));
  else
    (bank_element == 1 ? narrow_bfloat16 : narrow_float16)(now, static_cast<uint16_t*>(bank), width);
}

}  // namespace

const Table FASTKD_TABLE(table) = {exclude_ids,           softmax_weights, weighted_sum,
                                   weighted_sum_bfloat16, exponentials,    scale_row,
                                   add_scaled_row,        to_float32,      update_row};

}  // namespace fastkd::contrast
