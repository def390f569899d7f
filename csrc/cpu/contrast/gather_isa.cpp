// Gathered rows against one query: dot, loss and gradient while a row is in the first cache, rows ahead on their way.
//
// A gather is bound by memory: each row is read once, in the forward, and its share of the gradient is taken there.
// Reading the rows again in a backward of its own would double the time of the whole loss.
#include "cpu/contrast/op.h"
#include "cpu/contrast/widen.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {

namespace {

bool indices_in_range(const int64_t* index, int64_t count, int64_t rows) {
  uint64_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t k = 0; k < count; ++k) bad |= uint64_t(uint64_t(index[k]) >= uint64_t(rows));
  return !bad;
}

struct Float32 {
  static constexpr int bytes = 4;
  static vfloat at(const char* row, int64_t d) { return load(reinterpret_cast<const float*>(row) + d); }
};
struct BFloat16 {
  static constexpr int bytes = 2;
  static vfloat at(const char* row, int64_t d) { return load_bfloat16(reinterpret_cast<const uint16_t*>(row) + d); }
};

// Every second line of a row, from byte `from` on, into the second cache: the first has room for fewer requests on
// their way. The other half is asked for while the gradient is summed, since memory is to be busy all the time.
inline void fetch_half(const char* row, int64_t bytes, int64_t from) {
  for (int64_t at = from; at < bytes; at += 128) __builtin_prefetch(row + at, 0, 2);
}

// width: a multiple of kColumnStep; kWidth, if not 0, is the same number known beforehand.
template <class Element, int64_t kWidth>
inline float dot(const char* row, const float* query, int64_t width) {
  vfloat sum[2] = {};
#pragma GCC unroll 8
  for (int64_t d = 0; d < (kWidth ? kWidth : width); d += 2 * kLanes)
    for (int c = 0; c < 2; ++c) sum[c] += Element::at(row, d + c * kLanes) * load(query + d + c * kLanes);
  return sum_lanes(sum[0] + sum[1]);
}

// sum += weights of kGathered rows times the rows; fetches the odd lines of `next`. width: a multiple of kColumnStep.
template <class Element>
inline void add_rows(const char* const* row, const char* const* next, const float* weights, int64_t width, float* sum) {
  for (int64_t d = 0; d < width; d += 2 * kLanes) {
    vfloat a = load(sum + d), b = load(sum + d + kLanes), c = {}, e = {};
    const int64_t line = d * Element::bytes | 64;
    for (int r = 0; r < kGathered; r += 2) {
      __builtin_prefetch(next[r] + line, 0, 2);
      __builtin_prefetch(next[r + 1] + line, 0, 2);
      a += Element::at(row[r], d) * weights[r];
      b += Element::at(row[r], d + kLanes) * weights[r];
      c += Element::at(row[r + 1], d) * weights[r + 1];
      e += Element::at(row[r + 1], d + kLanes) * weights[r + 1];
    }
    store(sum + d, a + c);
    store(sum + d + kLanes, b + e);
  }
}

// weigh(scores, begin, count): scores [kGathered] become weights, those from `count` on are 0 and must become 0.
template <class Element, int64_t kWidth, class Weigh>
inline void walk(const Gathered& rows, const float* query, float* sum, bool in_place, Weigh&& weigh) {
  const int64_t bytes = rows.width * (rows.element == 0 ? 4 : rows.element == kFloat8 ? 1 : 2);
  const auto at = [&](int64_t k) { return rows.bank + rows.index[k] * rows.row_bytes; };
  for (int64_t k = 0; k < kGathered && k < rows.count; ++k) fetch_half(at(k), bytes, 0), fetch_half(at(k), bytes, 64);
  for (int64_t begin = 0; begin < rows.count; begin += kGathered) {
    const int64_t count = rows.count - begin < kGathered ? rows.count - begin : kGathered;
    const char *row[kGathered], *next[kGathered];
    float weights[kGathered] = {};
    for (int64_t r = 0; r < count; ++r) {
      row[r] = at(begin + r);
      next[r] = at(begin + r + kGathered < rows.count ? begin + r + kGathered : begin + r);
      fetch_half(next[r], bytes, 0);
      if (!sum || !in_place) fetch_half(next[r], bytes, 64);
      if (!in_place) {
        float* own = rows.scratch + r * rows.padded;
        widen_row(row[r], rows.element, rows.width, rows.scales ? rows.scales[rows.index[begin + r]] : 1, own);
        row[r] = reinterpret_cast<const char*>(own);
      }
      weights[r] = dot<Element, kWidth>(row[r], query, rows.padded);
    }
    for (int64_t r = count; r < kGathered; ++r) row[r] = row[0];
    weigh(weights, begin, count);
    if (sum) {
      if (count < kGathered) {  // a row that is not there must not count, even if row[0] is not finite
        for (int64_t r = 0; r < count; ++r)
          for (int64_t d = 0; d < rows.padded; d += kLanes)
            store(sum + d, load(sum + d) + Element::at(row[r], d) * weights[r]);
      } else {
        add_rows<Element>(row, in_place ? next : row, weights, rows.padded, sum);
      }
    }
  }
}

template <class Weigh>
inline void walk(const Gathered& rows, const float* query, float* sum, Weigh&& weigh) {
  const bool whole = rows.width == rows.padded && !rows.scales;
  if (whole && rows.element == 1) return walk<BFloat16, 0>(rows, query, sum, true, weigh);
  if (whole && rows.width == 128 && rows.element == 0) return walk<Float32, 128>(rows, query, sum, true, weigh);
  walk<Float32, 0>(rows, query, sum, whole && rows.element == 0, weigh);
}

inline vfloat score(vfloat dot, ScoreOptions o) {
  return (dot * o.scale - o.shift) + (dot * o.scale_low - o.shift_low);
}

// softplus and its derivative. sign -1: of the positive, softplus(-u).
struct NoiseTerm {
  vfloat loss, weight;
};
inline NoiseTerm noise_term(vfloat u, vfloat sign) {
  const vfloat v = u * sign, e = exp(-magnitude(v));
  const vfloat loss = (v > 0.f ? v : vfloat{}) + logarithm(e).log1p;
  return {loss, sign * ((v > 0.f ? splat(1.f) : e) / (1.f + e))};
}

double nce(const Gathered& rows, const float* query, ScoreOptions options, float* sum) {
  double loss = 0;
  walk(rows, query, sum, [&](float* weights, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      float sign[kLanes], losses[kLanes];
      for (int l = 0; l < kLanes; ++l) sign[l] = begin + i + l == 0 ? -1.f : 1.f;
      const NoiseTerm term = noise_term(score(load(weights + i), options), load(sign));
      store(losses, term.loss);
      store(weights + i, term.weight);
      for (int64_t l = 0; l < kLanes && i + l < count; ++l) loss += losses[l];
    }
  });
  return loss;
}

double softmax(const Gathered& rows, const float* query, ScoreOptions options, float* largest, float* sum) {
  double mass = 0;
  float top = -kInfinity;
  walk(rows, query, sum, [&](float* weights, int64_t begin, int64_t count) {
    float now = top;
    for (int64_t i = 0; i < kGathered; i += kLanes) store(weights + i, score(load(weights + i), options));
    for (int64_t r = 0; r < kGathered; ++r) {
      const bool dropped = r >= count || (rows.ids && rows.ids[rows.index[begin + r]] == rows.own);
      weights[r] = dropped ? -kInfinity : weights[r];
      now = weights[r] > now ? weights[r] : now;
    }
    const float shift = now == -kInfinity ? 0 : now;
    if (now != top) {
      float shrink[kLanes];
      store(shrink, exp(splat(top - shift)));
      mass *= shrink[0];
      for (int64_t d = 0; sum && d < rows.padded; d += kLanes) store(sum + d, load(sum + d) * shrink[0]);
      top = now;
    }
    for (int64_t i = 0; i < kGathered; i += kLanes) store(weights + i, exp(load(weights + i) - shift));
    for (int64_t r = 0; r < kGathered; ++r) mass += weights[r];
  });
  *largest = top;
  return mass;
}

}  // namespace

const GatherTable FASTKD_TABLE(gather_table) = {indices_in_range, nce, softmax};

}  // namespace fastkd::contrast
