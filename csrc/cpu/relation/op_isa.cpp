// Softmaxes of both sides down the columns of a tile; the mathematics is in relation/op.cpp.
#include "cpu/relation/op.h"

#include "cpu/simd/isa.h"
#include "cpu/simd/vec.h"

namespace fastkd::relation {

namespace {

static_assert(kQueryLanes % kLanes == 0, "queries must be whole vectors");

constexpr float kMaskedScore = -1e30f;  // finite, so that the difference of two such scores is a number
constexpr int64_t kRun = 64;            // rows that are summed before they meet the others

void mask_future_keys(const Tile& at) {
  for (int64_t key = 1; key < at.keys; ++key)
    for (int64_t i = 0; i < key && i < at.queries; ++i)
      at.s[key * at.stride + i] = at.t[key * at.stride + i] = kMaskedScore;
}

// Of one vector of queries.
struct Column {
  vfloat max_t, max_s;
  vfloat difference = max_s - max_t;
  vint maxima_are_near = magnitude(difference) < 1.f;

  vfloat teacher(vfloat b) const { return exp(b - max_t); }  // e^t, <= 1
  // a - b is exact where the sides are close; where they are not, it is rounded at the size of the larger score.
  vfloat shifted(vfloat a, vfloat b) const {
    return maxima_are_near ? (a - b) - difference : (a - max_s) - (b - max_t);
  }
  vfloat student(vfloat a) const { return a - max_s; }
};

Column maxima(const Tile& at, int64_t lane) {
  vfloat max_t = splat(-kInfinity), max_s = max_t;
  for (int64_t key = 0; key < at.keys; ++key) {
    max_t = larger(max_t, load(at.t + key * at.stride + lane));
    max_s = larger(max_s, load(at.s + key * at.stride + lane));
  }
  return {max_t, max_s};
}

// One key's share in the sums of its queries, and those sums.
struct KeyTerms {
  vfloat t, s, excess, bregman, cross;
  vint close = {};  // |c| < 1

  void add(const KeyTerms& other) {
    t += other.t, s += other.s, excess += other.excess, bregman += other.bregman, cross += other.cross;
  }
};

inline KeyTerms key_terms(const Column& column, vfloat a, vfloat b) {
  const vfloat e = column.teacher(b), c = column.shifted(a, b), cross = e * c;
  const vint near = c < 1.f;
  const Exponential x = exponential(near ? c : column.student(a));
  const vfloat grown = x.exp(), student = near ? e * grown : grown, difference = near ? e * x.expm1() : grown - e;
  const vint close = magnitude(c) < 1.f;  // expm1(c) - c > 0 has no limit
  return {e, student, difference, close ? e * x.expm1_minus_x() : difference - cross, cross, close};
}

// The value of a query with these sums, and what is remembered of them.
vfloat value_of(const KeyTerms& sum, const Column& column, const Stats& of, int64_t lane) {
  const vfloat difference = sum.excess / sum.t;
  const vint near = magnitude(difference) < 0.5f;
  store(of.max_t + lane, column.max_t);
  store(of.max_s + lane, column.max_s);
  store(of.sum_t + lane, near ? sum.t : -sum.t);
  store(of.excess + lane, near ? sum.excess : sum.s);
  return near ? sum.bregman / sum.t - logarithm(difference).y_minus_log1p
              : natural_logarithm(sum.s / sum.t) - sum.cross / sum.t;
}

// What was remembered, read again.
struct SavedSums {
  vfloat t, s, excess;
  vint near;

  SavedSums(const Stats& of, int64_t lane) : t(load(of.sum_t + lane)), excess(load(of.excess + lane)) {
    near = t > 0.f;
    t = magnitude(t);
    s = near ? t + excess : excess;
  }
};

template <bool kKeep>
void statistics_of(const Tile& at, const Stats& of, float* values, int64_t lane) {
  const Column column = maxima(at, lane);
  KeyTerms sum = {};
  for (int64_t begin = 0; begin < at.keys; begin += kRun) {
    const int64_t end = begin + kRun < at.keys ? begin + kRun : at.keys;
    KeyTerms run = {};
    for (int64_t key = begin; key < end; ++key) {
      float *s = at.s + key * at.stride + lane, *t = at.t + key * at.stride + lane;
      const KeyTerms one = key_terms(column, load(s), load(t));
      run.add(one);
      if constexpr (kKeep) {
        store(t, one.close ? one.t : -one.t);
        store(s, one.close ? one.excess : one.s);
      }
    }
    sum.add(run);
  }
  store(values + lane, value_of(sum, column, of, lane));
}

void statistics(const Tile& at, bool keep, const Stats& of, float* values) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes)
    keep ? statistics_of<true>(at, of, values, lane) : statistics_of<false>(at, of, values, lane);
}

// ValidTokens are e_t and, where |c| < 1, e_s - e_t; else -e_t and e_s: each to its last digit. Where the sums are
// near,
//
//     q - p = (e_s - e_t) / sum_s - e_t (sum_s - sum_t) / (sum_t sum_s): both small where q is near p;
//
// else e_s / sum_s - e_t / sum_t.
void gradient_from_saved(const Tile& at, const Stats& of, const float* g) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    const SavedSums sum(of, lane);
    const vfloat of_student = load(g + lane) / sum.s;
    const vfloat of_teacher = sum.near ? -sum.excess / sum.t * of_student : -load(g + lane) / sum.t;
    const vfloat difference_lacks = sum.near ? vfloat{} : splat(1),
                 student_lacks = difference_lacks - 1.f;  // times e_t
    for (int64_t key = 0; key < at.keys; ++key) {
      float* s = at.s + key * at.stride + lane;
      const vfloat valid = load(at.t + key * at.stride + lane), e = magnitude(valid);
      store(s, (load(s) + (bits(valid) < 0 ? student_lacks : difference_lacks) * e) * of_student + e * of_teacher);
    }
  }
}

// g (q - p) of a score.
struct ScoreGradient {
  Column column;
  vfloat p_scale, q_scale, kappa;

  ScoreGradient(const Stats& of, const float* g, int64_t lane) : column{load(of.max_t + lane), load(of.max_s + lane)} {
    const SavedSums sum(of, lane);
    p_scale = load(g + lane) / sum.t, q_scale = load(g + lane) / sum.s;
    kappa = sum.near ? logarithm(sum.excess / sum.t).log1p : natural_logarithm(sum.s / sum.t);
  }
  // Of a vector of queries, or of one for all lanes.
  ScoreGradient(const GradientFactors& of, int64_t lane)
      : column{load(of.max_t + lane), load(of.max_s + lane)},
        p_scale(load(of.p_scale + lane)),
        q_scale(load(of.q_scale + lane)),
        kappa(load(of.kappa + lane)) {}
  static ScoreGradient one(const GradientFactors& of, int64_t i) {
    return {{splat(of.max_t[i]), splat(of.max_s[i])}, splat(of.p_scale[i]), splat(of.q_scale[i]), splat(of.kappa[i])};
  }
  ScoreGradient(Column column, vfloat p_scale, vfloat q_scale, vfloat kappa)
      : column(column), p_scale(p_scale), q_scale(q_scale), kappa(kappa) {}

  vfloat operator()(vfloat a, vfloat b) const {
    const vfloat p = column.teacher(b) * p_scale, d = column.shifted(a, b) - kappa;
    const vint near = magnitude(d) < 1.f;
    const Exponential x = exponential(near ? d : column.student(a));
    return near ? p * x.expm1() : x.exp() * q_scale - p;
  }
};

void gradient_from_scores(const Tile& at, const Stats& of, const float* g) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    const ScoreGradient factor(of, g, lane);
    for (int64_t key = 0; key < at.keys; ++key) {
      float* s = at.s + key * at.stride + lane;
      store(s, factor(load(s), load(at.t + key * at.stride + lane)));
    }
  }
}

void diagonal_scores(const void* rows, int element, int64_t stride, int64_t count, int64_t width, float scale,
                     float* out) {
  constexpr int64_t kPiece = 256;
  float scratch[kPiece];
  for (int64_t i = 0; i < count; ++i) {
    const char* row = static_cast<const char*>(rows) + i * stride * (element == 0 ? 4 : 2);
    float sum = 0;
    for (int64_t k = 0; k < width; k += kPiece) {
      const int64_t size = width - k < kPiece ? width - k : kPiece;
      const float* x = as_floats(row + k * (element == 0 ? 4 : 2), element, scratch, size);
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < size; ++c) sum += x[c] * x[c];
    }
    out[i] = sum * scale;
  }
}

void add_query_sums(const Tile& at, const Stats& queries, const Sums& sums) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    const Column column = {load(queries.max_t + lane), load(queries.max_s + lane)};
    KeyTerms sum = {};
    for (int64_t i = lane, key = 0; key < at.keys; ++key, i += at.stride)
      sum.add(key_terms(column, load(at.s + i), load(at.t + i)));
    store(sums.t + lane, load(sums.t + lane) + sum.t);
    store(sums.s + lane, load(sums.s + lane) + sum.s);
    store(sums.excess + lane, load(sums.excess + lane) + sum.excess);
    store(sums.bregman + lane, load(sums.bregman + lane) + sum.bregman);
    store(sums.cross + lane, load(sums.cross + lane) + sum.cross);
  }
}

void add_key_sums(const Tile& at, const Stats& keys, const Sums& sums) {
  for (int64_t key = 0; key < at.keys; ++key) {
    const Column column = {splat(keys.max_t[key]), splat(keys.max_s[key])};
    KeyTerms sum = {};
    for (int64_t i = key * at.stride, lane = 0; lane < at.queries; lane += kLanes, i += kLanes)
      sum.add(key_terms(column, load(at.s + i), load(at.t + i)));
    sums.t[key] += sum_lanes(sum.t);
    sums.s[key] += sum_lanes(sum.s);
    sums.excess[key] += sum_lanes(sum.excess);
    sums.bregman[key] += sum_lanes(sum.bregman);
    sums.cross[key] += sum_lanes(sum.cross);
  }
}

void values_from_sums(const Sums& sums, int64_t count, const Stats& of, float* values) {
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    const KeyTerms sum = {load(sums.t + lane), load(sums.s + lane), load(sums.excess + lane), load(sums.bregman + lane),
                          load(sums.cross + lane)};
    store(values + lane, value_of(sum, {load(of.max_t + lane), load(of.max_s + lane)}, of, lane));
  }
}

void gradient_factors(const Stats& of, const float* g, int64_t count, const GradientFactors& to) {
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    const ScoreGradient factor(of, g, lane);
    store(to.max_t + lane, factor.column.max_t);
    store(to.max_s + lane, factor.column.max_s);
    store(to.p_scale + lane, factor.p_scale);
    store(to.q_scale + lane, factor.q_scale);
    store(to.kappa + lane, factor.kappa);
  }
}

void symmetric_gradient(const Tile& at, const GradientFactors& queries, const GradientFactors& keys) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    const ScoreGradient query(queries, lane);
    for (int64_t key = 0; key < at.keys; ++key) {
      float* s = at.s + key * at.stride + lane;
      const vfloat a = load(s), b = load(at.t + key * at.stride + lane);
      store(s, query(a, b) + ScoreGradient::one(keys, key)(a, b));
    }
  }
}

void to_bfloat16(const float* in, int64_t count, uint16_t* out) { narrow_bfloat16(in, out, count); }

void scale(const void* in, bool bfloat16, float by, int64_t count, void* out) {
  if (!bfloat16) {
    const auto* from = static_cast<const float*>(in);
    auto* to = static_cast<float*>(out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] * by;
    return;
  }
  constexpr int64_t kBlock = 256;
  float scratch[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    widen_bfloat16(static_cast<const uint16_t*>(in) + i, scratch, size);
    for (int64_t k = 0; k < size; ++k) scratch[k] *= by;
    narrow_bfloat16(scratch, static_cast<uint16_t*>(out) + i, size);
  }
}

}  // namespace

const Table FASTKD_TABLE(table) = {mask_future_keys, statistics,         gradient_from_saved, gradient_from_scores,
                                   diagonal_scores,  add_query_sums,     add_key_sums,        values_from_sums,
                                   gradient_factors, symmetric_gradient, to_bfloat16,         scale};

}  // namespace fastkd::relation
