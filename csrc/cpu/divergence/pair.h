// What the accurate path computes of one vector: p, q, their accurate difference and log ratio, and per kind the term
// of the value and the slope of the gradient. The vector is a part of one row, whose numbers are then floats (F), or
// has one element each of several rows, whose numbers are vectors. Only for divergence/op_isa.cpp, whose first lines
// have the mathematics.
#pragma once

namespace fastkd::divergence {

namespace {

// Whether value and gradient follow from the first sums: without a look at the row with the final kappa.
constexpr bool is_direct(int kind) { return kind == kForwardKL || kind == kSoftCE; }

// Of a row whose logits are all -inf on both sides, the statistics are 0.
inline bool no_class(const RowStats& stats) { return stats.sum_s == 0 && stats.sum_t == 0; }

// What the softmaxes of a row, or of several, need; the arithmetic of one vector.
template <class F>
struct Row {
  F max_s, max_t;
  float inverse_temperature;
  F inverse_sum_s, inverse_sum_t;
  F offset, offset_low;  // what is taken off s - t, as two floats: max_s - max_t, and T kappa once it is known
  bool exact;  // s - t with what its rounding loses: where the offset, of which no digit counts, is larger than c

  vfloat teacher(vfloat b) const { return exp((b - max_t) * inverse_temperature); }  // e^t, <= 1
  vfloat student(vfloat a) const { return (a - max_s) * inverse_temperature; }

  // c, or d once kappa is in the offset.
  template <bool kExact>
  vfloat log_ratio(vfloat a, vfloat b) const {
    const vfloat rounded = a - b;
    if (!kExact) return (rounded - offset) * inverse_temperature - offset_low * inverse_temperature;
    const vfloat back = rounded - a, lost = (a - (rounded - back)) - (b + back);  // NaN where a or b is infinite
    return ((rounded - offset) + (lost == lost ? lost - offset_low : vfloat{})) * inverse_temperature;
  }
};

// Whether the rounding of s - t is to be kept: the maxima differ much, or s is nearly t and a constant, which shows
// by `unlike` being small beside it.
inline bool exact(const Row<float>& row, float unlike) {
  const float offset = std::fabs(row.max_s - row.max_t), T = 1 / row.inverse_temperature;
  return offset > kFarMaxima * T || (offset > 0.03f * T && std::fabs(unlike) < offset);
}

inline Row<float> row_of(float max_s, float max_t, float inverse_temperature, float sum_s, float sum_t, double kappa) {
  const double log_sum_gap = double(max_s) - max_t, offset = log_sum_gap + kappa / inverse_temperature;
  const float high = float(offset), low = std::fabs(offset) < 3e38 ? float(offset - high) : 0.f;
  Row<float> row = {max_s, max_t, inverse_temperature, 1.f / sum_s, 1.f / sum_t, high, low, false};
  row.exact = exact(row, float(8 * kappa / inverse_temperature));  // kappa is small where the offset is constant
  return row;
}

// f(std::true_type) where row.exact, else f(std::false_type).
template <class F>
[[gnu::always_inline]] inline void by_exactness(const Row<float>& row, F&& f) {
  row.exact ? f(std::true_type{}) : f(std::false_type{});
}

// Adds what both log-sum-exps (and forward_kl) follow from. Returns e^t expm1(c); `exponential_t`: e^t.
template <bool kLoss, bool kEntropy, bool kExact, class F, int kSums>
[[gnu::always_inline]] inline vfloat add_moments(const Row<F>& row, vfloat a, vfloat b, vfloat (&sums)[kSums],
                                                 vfloat* exponential_t) {
  const vfloat e = *exponential_t = row.teacher(b), c = row.template log_ratio<kExact>(a, b);
  const vint near = magnitude(c) < 1.f;
  const Exponential x = exponential(near ? c : row.student(a));
  if constexpr (kEntropy) {  // log sum_t of a sure teacher: ones are summed separately
    sums[0] += e == 1.f ? vfloat{} : e;
    sums[5] += e == 1.f ? e : vfloat{};
  } else {
    sums[0] += e;
  }
  const vfloat more = near ? e * x.expm1() : x.exp() - e;
  sums[1] += more;
  if constexpr (kLoss) {
    const vint there = e > 0.f;
    const vfloat ec = there ? e * c : e;
    sums[2] += ec;
    sums[3] += there ? (near ? e * x.expm1_minus_x() : more - ec) : (near ? e : more);
  }
  if constexpr (kEntropy) sums[4] -= e > 0.f ? e * ((b - row.max_t) * row.inverse_temperature) : e;
  return more;
}

struct Pair {
  vfloat p, q, difference, log_ratio;  // difference = q - p, log_ratio = log(q / p)
};

// Where |d| < 1 the accurate way; elsewhere (and for NaN: a class both sides mask) q on its own.
template <bool kExact, class F>
[[gnu::always_inline]] inline Pair pair(const Row<F>& row, vfloat a, vfloat b) {
  const vfloat p = row.teacher(b) * row.inverse_sum_t;
  const vfloat d = row.template log_ratio<kExact>(a, b);
  const vint near = magnitude(d) < 1.f;
  const Exponential e = exponential(near ? d : row.student(a));
  const vfloat far = e.exp() * row.inverse_sum_s;
  const vfloat difference = near ? p * e.expm1() : far - p;
  return {p, near ? p + difference : far, difference, d};
}

// log(m / a), and a lambda(n / a) for n = m - a: the term of KL(a || m). Without a, 0 and n, the limits.
struct ToMixture {
  vfloat log_ratio, term;
};

inline ToMixture against_mixture(vfloat a, vfloat m, vfloat n) {
  const vint there = a > kTiny;
  const vfloat per_a = 1.f / (there ? a : splat(1.f));
  const Logarithm x = logarithm(n * per_a, m * per_a);
  const vfloat none = a * 0.f;  // NaN stays
  return {there ? x.log1p : none, there ? a * x.y_minus_log1p : n + none};
}

inline vfloat mixture(const Pair& x, const Options& o) { return o.rest * x.p + o.mix * x.q; }

// p lambda(n / p), the term of KL(p || p + n), where log(1 + n / p) is known. Without p it is n, the limit.
inline vfloat bregman(vfloat p, vfloat n, vfloat log_ratio) {
  const vint there = p > kTiny;
  const vfloat y = n / (there ? p : splat(1.f));
  const vfloat term = magnitude(y) < 0.4f ? p * logarithm(y).y_minus_log1p : n - p * log_ratio;
  return there ? term : n + p * 0.f;  // p * 0: NaN stays
}

// (h - centre) - mean, h of the gradient q (h - sum q h) up to a constant per row: chosen so that it is small where p
// and q agree. skew_kl with a centre of mix is far from that: h - mix, taken without subtracting, is small where the
// teacher is.
template <int kKind, class F>
[[gnu::always_inline]] inline vfloat slope(const Pair& x, const Options& o, F centre, F mean) {
  if constexpr (kKind == kReverseKL) return (x.q > 0.f ? x.log_ratio : x.q * 0.f) - centre - mean;  // q log q is 0 at 0
  if constexpr (kKind == kSkewKL) {
    const auto far = centre == o.mix;
    const vfloat m = mixture(x, o), of_m = far ? -x.p : o.mix * x.difference;
    const vint there = m > kTiny;
    const vfloat h = of_m * (o.mix / (there ? m : splat(1.f)));
    return (there ? h - (far ? F{} : centre) : m * 0.f) - mean;
  }
  if constexpr (kKind == kJSD)
    return -o.mix * against_mixture(x.q, mixture(x, o), -o.rest * x.difference).log_ratio - centre - mean;
  if constexpr (kKind == kTVD) {
    const vfloat up = vfloat{} + (0.5f - centre - mean), down = vfloat{} + (-0.5f - centre - mean);
    return x.difference > 0.f ? up : (x.difference < 0.f ? down : x.difference * 0.f + (-centre - mean));
  }
  return vfloat{};
}

template <int kKind>
[[gnu::always_inline]] inline vfloat term(const Pair& x, const Options& o) {
  if constexpr (kKind == kForwardKL) return bregman(x.p, x.difference, x.log_ratio);
  if constexpr (kKind == kReverseKL) return bregman(x.q, -x.difference, -x.log_ratio);
  if constexpr (kKind == kSkewKL || kKind == kJSD) {
    const vfloat m = mixture(x, o), of_p = against_mixture(x.p, m, o.mix * x.difference).term;
    if (kKind == kSkewKL) return of_p;
    return o.rest * of_p + o.mix * against_mixture(x.q, m, -o.rest * x.difference).term;
  }
  if constexpr (kKind == kTVD) return 0.5f * magnitude(x.difference);
  return vfloat{};
}

// f(std::integral_constant<int, kind>).
template <class F>
auto by_kind(int kind, const F& f) {
  switch (kind) {
    case kForwardKL:
      return f(std::integral_constant<int, kForwardKL>());
    case kReverseKL:
      return f(std::integral_constant<int, kReverseKL>());
    case kSkewKL:
      return f(std::integral_constant<int, kSkewKL>());
    case kJSD:
      return f(std::integral_constant<int, kJSD>());
    case kTVD:
      return f(std::integral_constant<int, kTVD>());
    case kSoftCE:
      return f(std::integral_constant<int, kSoftCE>());
    default:
      return f(std::integral_constant<int, kMSE>());
  }
}

}  // namespace

}  // namespace fastkd::divergence
