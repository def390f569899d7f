// Row-wise divergence between q = softmax(s / T) and p = softmax(t / T): one row at a time, while it is in the cache.
//
// As the student nears the teacher, log q - log p loses its digits if both are formed. Here it never is: s - t is taken
// with what its rounding loses, c = ((s - t) - (max s - max t)) / T is small, and
//
//     kappa = log sum_v p e^c = log1p(sum_v p expm1(c)),   d = log(q / p) = c - kappa,   q - p = p expm1(d).
//
// Where |d| >= 1, p and q come from exponentials of their own: p + p expm1(d) would lose the digits of a small q.
//
// Every kind but mse is then a Bregman divergence of p, q and their accurate difference: with lambda(y) = y - log1p(y),
//
//     KL(p || p + n) = sum p lambda(n / p)   when sum n = 0:   each term >= 0, nothing cancels.
//
// forward_kl needs one pass less: it follows from sums of e^t expm1(c), e^t c and e^t (expm1(c) - c).
#include "cpu/divergence/op.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/simd/isa.h"
#include "cpu/simd/vec.h"

namespace fastkd::divergence {
namespace {

constexpr int64_t kChunk = 64 * kLanes;  // partial sums are folded into doubles after so many elements
typedef int64_t vlong __attribute__((vector_size(kLanes * 8)));
constexpr float kTiny = 1e-37f;  // below it a probability counts as 0, so that no ratio overflows
constexpr float kSmallKappa = 0.5f;
constexpr float kFarMaxima = 16;  // in units of T

// f(a, b, i, count): vectors of s and t at i; a last short one is filled up with -inf, which is probability 0.
template <class F>
[[gnu::always_inline]] inline void sweep(const float* s, const float* t, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(load(s + i), load(t + i), i, kLanes);
  if (i < end) {
    const int rest = int(end - i);
    f(load_some(s + i, rest, -kInfinity), load_some(t + i, rest, -kInfinity), i, rest);
  }
}

// Sums of N quantities over a row: f(a, b, sums, i, count) adds to N vectors.
template <int N, class F>
[[gnu::always_inline]] inline void accumulate(const float* s, const float* t, int64_t columns, double (&totals)[N],
                                              F&& f) {
  for (double& total : totals) total = 0;
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t end = begin + kChunk < columns ? begin + kChunk : columns;
    vfloat sums[N] = {};
    sweep(s, t, begin, end, [&](vfloat a, vfloat b, int64_t i, int count) { f(a, b, sums, i, count); });
    for (int k = 0; k < N; ++k) totals[k] += sum_lanes(sums[k]);
  }
}

}  // namespace
}  // namespace fastkd::divergence

#include "cpu/divergence/fast_path.h"
#include "cpu/divergence/pair.h"

namespace fastkd::divergence {
namespace {

// Adds the sums that both log-sum-exps (and forward_kl) follow from. kKeep: leaves e^t expm1(c) in `excess` and e^t in
// `exponential_t`, for a gradient.
template <bool kLoss, bool kEntropy, bool kKeep, bool kExact>
void sum_moments(const Row<float>& row, const float* s, const float* t, int64_t columns, RowSums* sums, float* excess,
                 float* exponential_t) {
  constexpr int kSums = kEntropy ? 6 : kLoss ? 4 : 2;
  double totals[kSums];
  accumulate(s, t, columns, totals, [&](vfloat a, vfloat b, vfloat(&sums)[kSums], int64_t i, int count) {
    vfloat e;
    const vfloat more = add_moments<kLoss, kEntropy, kExact>(row, a, b, sums, &e);
    if constexpr (kKeep) {
      store_some(excess + i, more, count);
      store_some(exponential_t + i, e, count);
    }
  });
  if constexpr (kEntropy) totals[0] += totals[5];
  double sum_s = totals[0] + totals[1], of_student[1];
  if (!(sum_s > 0.25 * totals[0])) {  // they cancel
    accumulate(s, s, columns, of_student,
               [&](vfloat a, vfloat, vfloat(&sums)[1], int64_t, int) { sums[0] += exp(row.student(a)); });
    sum_s = of_student[0];
  }
  sums->sum_t += totals[0], sums->sum_s += sum_s, sums->excess += totals[1];
  if constexpr (kLoss) sums->mean_c += totals[2], sums->bregman += totals[3];
  if constexpr (kEntropy) sums->entropy += totals[4];
}

// The maxima of both sides; `top`: the chunk in which the student's lies.
Row<float> maxima(const float* s, const float* t, int64_t columns, float inverse_temperature, int64_t* top) {
  float best_s = -kInfinity;
  vfloat best_t = splat(-kInfinity);
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t end = begin + kChunk < columns ? begin + kChunk : columns;
    vfloat of_chunk = splat(-kInfinity);
    sweep(s, t, begin, end, [&](vfloat a, vfloat b, int64_t, int) {
      of_chunk = larger(a, of_chunk);
      best_t = larger(b, best_t);
    });
    if (max_lanes(of_chunk) > best_s) best_s = max_lanes(of_chunk), *top = begin;
  }
  return {best_s, max_lanes(best_t), inverse_temperature, 0, 0, 0, 0, false};
}

// t where s is max_s, in the chunk from `begin`.
float teacher_at_student_maximum(const float* s, const float* t, int64_t begin, int64_t columns, float max_s) {
  for (int64_t i = begin; i < columns && i < begin + kChunk; ++i)
    if (s[i] == max_s) return t[i];
  return max_s;
}

// The sums relative to larger maxima: every e^t is multiplied by `t` and every c grows by `delta`, so e^s by `s`.
void rebase_sums(float max_s, float max_t, double inverse_temperature, RowSums* sums) {
  const double up_s = (double(sums->max_s) - max_s) * inverse_temperature;
  const double up_t = (double(sums->max_t) - max_t) * inverse_temperature;
  const bool first = sums->sum_t == 0 && sums->sum_s == 0;
  if (!first && (up_s != 0 || up_t != 0)) {
    const double s = std::exp(up_s), t = std::exp(up_t), delta = up_s - up_t;
    const double change = std::fabs(delta) < 1 ? t * std::expm1(delta) : s - t;
    const double of_t = t > 0 ? t * delta : 0;
    sums->bregman = t * sums->bregman + change * sums->excess + (change - of_t) * sums->sum_t;
    sums->excess = s * sums->excess + change * sums->sum_t;
    sums->entropy = t * sums->entropy - (t > 0 ? t * up_t : 0) * sums->sum_t;
    sums->mean_c = t * sums->mean_c + of_t * sums->sum_t;
    sums->sum_t *= t, sums->sum_s *= s;
  }
  sums->max_s = max_s, sums->max_t = max_t;
}

template <int kKind, bool kKeep>
void accumulate_part(const float* s, const float* t, int64_t columns, Options options, RowSums* sums,
                     GradRequest gradient) {
  if constexpr (kKind == kMSE) {
    double totals[1];
    accumulate(s, t, columns, totals, [&](vfloat a, vfloat b, vfloat(&sums)[1], int64_t, int) {
      const vint same = a == b;  // also the filling of a short last vector
      sums[0] += same ? vfloat{} : (a - b) * (a - b);
    });
    sums->value += totals[0];
  } else {
    int64_t top = 0;
    Row<float> row = maxima(s, t, columns, options.inverse_temperature, &top);
    if (row.max_s == -kInfinity && row.max_t == -kInfinity && s[0] == t[0]) return;  // no class exists on either side
    if (row.max_s > sums->max_s) sums->top_t = teacher_at_student_maximum(s, t, top, columns, row.max_s);
    row.max_s = row.max_s > sums->max_s ? row.max_s : sums->max_s;
    row.max_t = row.max_t > sums->max_t ? row.max_t : sums->max_t;
    if (row.max_s == -kInfinity) row.max_s = row.max_t;
    if (row.max_t == -kInfinity) row.max_t = row.max_s;
    const float top_s = row.max_s;
    const double balanced = row.max_t + sums->log_sum_gap;
    if (std::fabs(balanced - row.max_s) * options.inverse_temperature < 20) row.max_s = float(balanced);
    rebase_sums(row.max_s, row.max_t, options.inverse_temperature, sums);
    row = row_of(row.max_s, row.max_t, options.inverse_temperature, 1, 1, 0);
    row.exact = exact(row, (top_s - sums->top_t) - (row.max_s - row.max_t));
    by_exactness(row, [&](auto exact) {
      sum_moments<is_direct(kKind), kKind == kSoftCE, kKeep, decltype(exact)::value>(row, s, t, columns, sums,
                                                                                     gradient.out, gradient.scratch);
    });
  }
}

// KL(p || q) from the moments, by whichever of two forms keeps its digits; a NaN-free negative answer asks for a pass.
double kl_from(const RowSums& m, double kappa) {
  const double x = m.excess / m.sum_t, mean_c = m.mean_c / m.sum_t, bregman = m.bregman / m.sum_t;
  if (mean_c == -kInfinity) return kInfinity;  // q is 0 for a token whose p is not
  const double direct = kappa - mean_c, shifted = bregman - (x - kappa);
  if (shifted > 0.25 * bregman) return shifted;  // first: of the terms of mean_c, but not of bregman's, signs differ
  if (direct > 0.25 * (std::fabs(kappa) + std::fabs(mean_c))) return direct;
  return bregman == 0 ? 0 : (std::isnan(bregman) ? bregman : -1);
}

double entropy_of(const RowSums& m) { return m.entropy / m.sum_t + std::log(m.sum_t); }

inline Row<float> row_of(Options options, const RowStats& stats) {
  return row_of(stats.max_s, stats.max_t, options.inverse_temperature, stats.sum_s, stats.sum_t, stats.kappa);
}

// h of the student's likeliest token. Where a token has nearly all of q, h - mean would be a difference of equals.
float centre_of(Options options, const RowStats& stats, float top_t) {
  const Pair top = pair<true>(row_of(options, stats), splat(stats.max_s), splat(top_t));
  const float h = by_kind(options.kind, [&](auto kind) { return slope<kind>(top, options, 0.f, 0.f); })[0];
  if (options.kind == kSkewKL && h > 0.5f * options.mix) return options.mix;
  return std::fabs(h) < kInfinity ? h : 0;
}

bool finish_sums(Options options, const RowSums& sums, RowStats* stats, float* value) {
  *stats = {};
  *value = options.kind == kMSE ? float(sums.value) : 0;
  if (options.kind == kMSE || (sums.max_s == -kInfinity && sums.max_t == -kInfinity)) return false;
  const double x = sums.excess / sums.sum_t;
  const double kappa = std::fabs(x) < 0.5 ? std::log1p(x) : std::log(sums.sum_s / sums.sum_t);
  *stats = {sums.max_s, sums.max_t, float(sums.sum_s), float(sums.sum_t), float(kappa), 0, 0};
  if (!is_direct(options.kind)) {
    stats->centre = centre_of(options, *stats, sums.top_t);
    return true;
  }
  const double kl = kl_from(sums, kappa);
  *value = float(kl + (options.kind == kSoftCE ? entropy_of(sums) : 0));
  return kl < 0;
}

// The value with the final kappa, and the mean of h - centre over the q that the backward will see, so that its
// rounding cancels.
template <int kKind>
void refine_part(const float* s, const float* t, int64_t columns, Options options, const RowStats& stats,
                 RowSums* sums) {
  const Row<float> row = row_of(options, stats);
  const float centre = stats.centre;
  double totals[3];
  by_exactness(row, [&](auto exact) {
    accumulate(s, t, columns, totals, [&](vfloat a, vfloat b, vfloat(&sums)[3], int64_t, int) {
      const Pair x = pair<decltype(exact)::value>(row, a, b);
      sums[0] += term<kKind>(x, options);
      sums[1] += x.q;
      sums[2] += x.q * slope<kKind>(x, options, centre, 0.f);
    });
  });
  sums->value += totals[0], sums->sum_q += totals[1], sums->mean_h += totals[2];
}

void finish_value(Options options, const RowSums& sums, RowStats* stats, float* value) {
  *value = float(sums.value + (options.kind == kSoftCE ? entropy_of(sums) : 0));
  stats->mean = is_direct(options.kind) ? 0 : float(sums.mean_h / sums.sum_q);
}

template <int kKind>
void backward(const float* s, const float* t, int64_t columns, Options options, const RowStats& stats, float upstream,
              float* grad) {
  const float scale = kKind == kMSE ? 2 * upstream : upstream * options.inverse_temperature;
  if (kKind != kMSE && no_class(stats)) {
    std::memset(grad, 0, columns * sizeof(float));
    return;
  }
  const Row<float> row = row_of(options, stats);
  const float centre = stats.centre, mean = stats.mean;
  by_exactness(row, [&](auto exact) {
    sweep(s, t, 0, columns, [&](vfloat a, vfloat b, int64_t i, int count) {
      vfloat out;
      if constexpr (kKind == kMSE) {
        out = a == b ? vfloat{} : (a - b) * scale;
      } else {
        const Pair x = pair<decltype(exact)::value>(row, a, b);
        if constexpr (is_direct(kKind))
          out = x.difference * scale;
        else
          out = x.q * slope<kKind>(x, options, centre, mean) * scale;
      }
      store_some(grad + i, out, count);
    });
  });
}

}  // namespace
}  // namespace fastkd::divergence

#include "cpu/divergence/few_columns.h"

namespace fastkd::divergence {
namespace {

// Values of any row, and of forward_kl and soft_ce (kKeep) also the gradient.
template <int kKind, bool kKeep>
float accurate_forward(const float* s, const float* t, int64_t columns, Options options, RowStats* stats,
                       GradRequest gradient, double log_sum_gap) {
  RowSums sums;
  sums.log_sum_gap = log_sum_gap;
  float value;
  accumulate_part<kKind, kKeep>(s, t, columns, options, &sums, gradient);
  const bool again = finish_sums(options, sums, stats, &value);
  if constexpr (kKeep) {  // q - p = e^t expm1(c) / sum_s + e^t (1 / sum_s - 1 / sum_t), of which neither is much larger
    const double scale = double(gradient.upstream) * options.inverse_temperature, sum_s = sums.sum_s;
    const float of_excess = float(scale / sum_s), of_teacher = float(scale * (sums.excess / sum_s) / sums.sum_t);
    if (sums.max_s == -kInfinity && sums.max_t == -kInfinity)
      std::memset(gradient.out, 0, columns * sizeof(float));
    else if (!(std::fabs(stats->kappa) < kSmallKappa))
      backward<kKind>(s, t, columns, options, *stats, gradient.upstream, gradient.out);
    else
      sweep(gradient.out, gradient.scratch, 0, columns, [&](vfloat a, vfloat b, int64_t i, int count) {
        store_some(gradient.out + i, a * of_excess - b * of_teacher, count);
      });
  }
  if (again) {
    refine_part<kKind == kSoftCE ? kForwardKL : kKind>(s, t, columns, options, *stats, &sums);
    finish_value(options, sums, stats, &value);
  }
  return value;
}

template <int kKind>
float forward(const float* s, const float* t, int64_t columns, Options options, RowStats* stats, GradRequest gradient) {
  if constexpr (is_direct(kKind)) {
    constexpr bool kEntropy = kKind == kSoftCE;
    const float scale = gradient.upstream * options.inverse_temperature;
    const auto fast = gradient.out ? fast_forward<kEntropy, true> : fast_forward<kEntropy, false>;
    const FastResult x = fast(s, t, columns, options.inverse_temperature, scale, gradient.out, gradient.scratch, stats);
    if (!x.refused) return float(kEntropy ? x.kl + x.entropy : x.kl);
    const auto accurate = gradient.out ? accurate_forward<kKind, true> : accurate_forward<kKind, false>;
    return accurate(s, t, columns, options, stats, gradient, x.log_sum_gap);
  } else {
    const float value = accurate_forward<kKind, false>(s, t, columns, options, stats, gradient, NAN);
    if (gradient.out) backward<kKind>(s, t, columns, options, *stats, gradient.upstream, gradient.out);
    return value;
  }
}

float forward_any(const float* s, const float* t, int64_t columns, Options options, RowStats* stats,
                  GradRequest gradient) {
  return by_kind(options.kind, [&](auto kind) { return forward<kind>(s, t, columns, options, stats, gradient); });
}

void backward_any(const float* s, const float* t, int64_t columns, Options options, const RowStats& stats,
                  float upstream, float* grad) {
  by_kind(options.kind, [&](auto kind) { backward<kind>(s, t, columns, options, stats, upstream, grad); });
}

void forward_rows_any(const float* s, const float* t, int64_t rows, int64_t columns, Options options, RowStats* stats,
                      float* values, GradRequest gradient) {
  by_kind(options.kind, [&](auto kind) { forward_rows<kind>(s, t, rows, columns, options, stats, values, gradient); });
}

void backward_rows_any(const float* s, const float* t, int64_t rows, int64_t columns, Options options,
                       const RowStats* stats, const float* upstream, float* grad) {
  by_kind(options.kind, [&](auto kind) { backward_rows<kind>(s, t, rows, columns, options, stats, upstream, grad); });
}

void accumulate_part_any(const float* s, const float* t, int64_t columns, Options options, RowSums* sums) {
  by_kind(options.kind, [&](auto kind) { accumulate_part<kind, false>(s, t, columns, options, sums, {}); });
}

void refine_part_any(const float* s, const float* t, int64_t columns, Options options, const RowStats& stats,
                     RowSums* sums) {
  by_kind(options.kind,
          [&](auto kind) { refine_part<kind == kSoftCE ? kForwardKL : kind>(s, t, columns, options, stats, sums); });
}

float largest(const float* s, int64_t columns) {
  vfloat best = splat(-kInfinity);
  sweep(s, s, 0, columns, [&](vfloat a, vfloat, int64_t, int) { best = larger(a, best); });
  return max_lanes(best);
}

// e^x in double to 2e-10, for -708 < x <= 0: float32 would know each term, and so a row of few tokens, to 1e-7 at best.
inline vdouble exp_of_negative(vdouble x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: see exponential() in simd/vec.h
  const vdouble shifted = x * 1.4426950408889634 + kRound;
  const vdouble r = x - (shifted - kRound) * 0.6931471805599453;
  vdouble y = r * (1. / 40320) + 1. / 5040;
  y = y * r + 1. / 720;
  y = y * r + 1. / 120;
  y = y * r + 1. / 24;
  y = y * r + 1. / 6;
  y = y * r + 0.5;
  y = y * r + 1;
  y = y * r + 1;
  return (vdouble)((vlong)y + ((vlong)shifted << 52));
}

double sum_of_exponentials(const float* s, int64_t columns, double inverse_temperature, float largest) {
  vdouble sum = {};
  const vfloat least = splat(float(std::max(largest - 700 / inverse_temperature, -3e38)));
  const auto add = [&](vfloat x) {  // NaN stays
    sum += exp_of_negative((wide(larger(least, x)) - largest) * inverse_temperature);
  };
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) add(load(s + i));
  if (i < columns) add(load_some(s + i, int(columns - i), -kInfinity));
  return sum_lanes(sum);
}

void scaled_softmax(const float* s, int64_t columns, float inverse_temperature, float log_sum, float log_sum_low,
                    float scale, float* out) {
  sweep(s, s, 0, columns, [&](vfloat a, vfloat, int64_t i, int count) {
    store_some(out + i, exp(((a - log_sum) - log_sum_low) * inverse_temperature) * scale, count);
  });
}

void narrow(const float* in, int element, void* out, int64_t count) {
  (element == 1 ? narrow_bfloat16 : narrow_float16)(in, static_cast<uint16_t*>(out), count);
}

}  // namespace

const Table FASTKD_TABLE(table) = {
    kFewColumns, forward_any,     backward_any, forward_rows_any, backward_rows_any,   accumulate_part_any,
    finish_sums, refine_part_any, finish_value, largest,          sum_of_exponentials, scaled_softmax,
    as_floats,   narrow};

}  // namespace fastkd::divergence
