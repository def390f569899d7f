// The forward of a row whose words come in parts (divergence.h), from the same sums as a whole row's. Only for
// divergence_isa.cpp.
#pragma once

namespace {

// The sums relative to larger maxima: every e^t is multiplied by `t` and every c grows by `delta`, so e^s by `s`.
void move_to(float max_s, float max_t, double inverse_temperature, DivergenceSums* sums) {
  const double up_s = (double(sums->max_s) - max_s) * inverse_temperature;
  const double up_t = (double(sums->max_t) - max_t) * inverse_temperature;
  const bool first = sums->sum_t == 0 && sums->excess == 0;
  if (!first && (up_s != 0 || up_t != 0)) {
    const double s = std::exp(up_s), t = std::exp(up_t), delta = up_s - up_t;
    const double change = std::fabs(delta) < 1 ? t * std::expm1(delta) : s - t;
    const double of_t = t > 0 ? t * delta : 0;
    sums->bregman = t * sums->bregman + change * sums->excess + (change - of_t) * sums->sum_t;
    sums->excess = s * sums->excess + change * sums->sum_t;
    sums->entropy = t * sums->entropy - (t > 0 ? t * up_t : 0) * sums->sum_t;
    sums->mean_c = t * sums->mean_c + of_t * sums->sum_t;
    sums->sum_t *= t;
  }
  sums->max_s = max_s, sums->max_t = max_t;
}

template <int kKind>
void gather(const float* s, const float* t, int64_t columns, DivergenceOptions options, DivergenceSums* sums) {
  if constexpr (kKind == kMSE) {
    double totals[1];
    accumulate(s, t, columns, totals, [&](vfloat a, vfloat b, vfloat(&sums)[1], int64_t, int) {
      const vint same = a == b;  // also the filling of a short last vector
      sums[0] += same ? vfloat{} : (a - b) * (a - b);
    });
    sums->value += totals[0];
  } else {
    Row row = maxima(s, t, columns, options.inverse_temperature);
    if (row.max_s == -kInfinity && row.max_t == -kInfinity && s[0] == t[0]) return;  // no class exists on either side
    row.max_s = row.max_s > sums->max_s ? row.max_s : sums->max_s;
    row.max_t = row.max_t > sums->max_t ? row.max_t : sums->max_t;
    if (row.max_s == -kInfinity) row.max_s = row.max_t;
    if (row.max_t == -kInfinity) row.max_t = row.max_s;
    move_to(row.max_s, row.max_t, options.inverse_temperature, sums);
    const Moments m = moments < kKind == kForwardKL || kKind == kSoftCE, kKind == kSoftCE,
                  false > (row, s, t, columns, nullptr, nullptr);
    sums->sum_t += m.sum_t, sums->excess += m.excess, sums->mean_c += m.mean_c;
    sums->bregman += m.bregman, sums->entropy += m.entropy;
  }
}

double entropy_of(const DivergenceSums& m) { return m.entropy / m.sum_t + std::log(m.sum_t); }

bool conclude(DivergenceOptions options, const DivergenceSums& sums, DivergenceStats* stats, float* value) {
  *stats = {};
  *value = options.kind == kMSE ? float(sums.value) : 0;
  if (options.kind == kMSE || (sums.max_s == -kInfinity && sums.max_t == -kInfinity)) return false;
  const double kappa = std::log1p(sums.excess / sums.sum_t), sum_s = sums.sum_t + sums.excess;
  *stats = {sums.max_s, sums.max_t, float(sum_s), float(sums.sum_t), float(kappa), 0};
  if (options.kind != kForwardKL && options.kind != kSoftCE) return true;
  const double kl = kl_from({sums.sum_t, sums.excess, sums.mean_c, sums.bregman, sums.entropy}, kappa);
  *value = float(kl + (options.kind == kSoftCE ? entropy_of(sums) : 0));
  return kl < 0;
}

inline Row row_of(DivergenceOptions options, const DivergenceStats& stats) {
  return {stats.max_s, stats.max_t, options.inverse_temperature, 1.f / stats.sum_s, 1.f / stats.sum_t, stats.kappa};
}

// The value with the final kappa, and the mean of h over the q that the backward will see, so that its rounding
// cancels.
template <int kKind>
void refine(const float* s, const float* t, int64_t columns, DivergenceOptions options, const DivergenceStats& stats,
            DivergenceSums* sums) {
  const Row row = row_of(options, stats);
  double totals[3];
  accumulate(s, t, columns, totals, [&](vfloat a, vfloat b, vfloat(&sums)[3], int64_t, int) {
    const Pair x = pair(row, a, b);
    sums[0] += term<kKind>(x, options.mix);
    sums[1] += x.q;
    sums[2] += x.q * slope<kKind>(x, options.mix);
  });
  sums->value += totals[0], sums->sum_q += totals[1], sums->mean_h += totals[2];
}

void settle(DivergenceOptions options, const DivergenceSums& sums, DivergenceStats* stats, float* value) {
  const bool direct = options.kind == kForwardKL || options.kind == kSoftCE;
  *value = float(sums.value + (options.kind == kSoftCE ? entropy_of(sums) : 0));
  stats->mean = direct ? 0 : float(sums.mean_h / sums.sum_q);
}

void gather_any(const float* s, const float* t, int64_t columns, DivergenceOptions options, DivergenceSums* sums) {
  static constexpr decltype(&gather<0>) kGather[] = {gather<0>, gather<1>, gather<2>, gather<3>,
                                                     gather<4>, gather<5>, gather<6>};
  kGather[options.kind](s, t, columns, options, sums);
}

void refine_any(const float* s, const float* t, int64_t columns, DivergenceOptions options,
                const DivergenceStats& stats, DivergenceSums* sums) {
  static constexpr decltype(&refine<0>) kRefine[] = {refine<0>, refine<1>, refine<2>, refine<3>, refine<4>, refine<0>};
  kRefine[options.kind](s, t, columns, options, stats, sums);
}

}  // namespace
