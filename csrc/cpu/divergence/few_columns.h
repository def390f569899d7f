// Rows of few columns, kLanes of them at a time, each in its own lane of every vector. One after another, they would
// leave most lanes idle, and end in sums over lanes. Only for divergence/op_isa.cpp, which has the arithmetic.
#pragma once

namespace fastkd::divergence {

namespace {

constexpr int64_t kFewColumns = kLanes == 16 ? 24 : 2 * kLanes;  // columns up to which this was faster, in most kinds

// [kLanes][columns] <-> [columns][kLanes]; where there are fewer rows, the last one is repeated.
inline void into_lanes(const float* rows, int count, int64_t columns, float* out) {
  for (int r = 0; r < kLanes; ++r)
    for (int64_t j = 0; j < columns; ++j) out[j * kLanes + r] = rows[(r < count ? r : count - 1) * columns + j];
}

inline void from_lanes(const float* in, int count, int64_t columns, float* rows) {
  for (int r = 0; r < count; ++r)
    for (int64_t j = 0; j < columns; ++j) rows[r * columns + j] = in[j * kLanes + r];
}

inline Row<vfloat> rows_of(Options options, const RowStats* stats) {
  Row<vfloat> all = {};
  all.inverse_temperature = options.inverse_temperature;
  for (int r = 0; r < kLanes; ++r) {
    const Row<float> row = row_of(options, stats[r]);
    all.max_s[r] = row.max_s, all.max_t[r] = row.max_t;
    all.inverse_sum_s[r] = row.inverse_sum_s, all.inverse_sum_t[r] = row.inverse_sum_t;
    all.offset[r] = row.offset, all.offset_low[r] = row.offset_low;
  }
  return all;
}

// A block of rows in their lanes; `stats` and `values` of all lanes.
template <int kKind>
void forward_block(const float* s, const float* t, int64_t size, Options options, RowStats* stats, float* values) {
  if constexpr (kKind == kMSE) {
    vfloat sum = {};
    sweep(s, t, 0, size, [&](vfloat a, vfloat b, int64_t, int) { sum += a == b ? vfloat{} : (a - b) * (a - b); });
    store(values, sum);
    for (int r = 0; r < kLanes; ++r) stats[r] = {};
  } else {
    vfloat max_s = splat(-kInfinity), max_t = max_s, top_t = {};
    sweep(s, t, 0, size, [&](vfloat a, vfloat b, int64_t, int) {
      top_t = a > max_s ? b : top_t;
      max_s = larger(a, max_s);
      max_t = larger(b, max_t);
    });
    const vint none = (max_s == -kInfinity) & (max_t == -kInfinity) & (load(s) == load(t));  // of all classes
    max_s = max_s == -kInfinity ? max_t : max_s;
    max_t = max_t == -kInfinity ? max_s : max_t;
    for (int r = 0; r < kLanes; ++r) stats[r] = {max_s[r], max_t[r], 1, 1, 0, 0, 0};
    vfloat sums[6] = {}, of_student = {};
    const Row<vfloat> first = rows_of(options, stats);
    sweep(s, t, 0, size, [&](vfloat a, vfloat b, int64_t, int) {
      vfloat exponential_t;
      add_moments<is_direct(kKind), kKind == kSoftCE, true>(first, a, b, sums, &exponential_t);
    });
    const vfloat sum_t = sums[0] + sums[5];
    if (any_lane(~(sum_t + sums[1] > 0.25f * sum_t)))  // they cancel
      sweep(s, s, 0, size, [&](vfloat a, vfloat, int64_t, int) { of_student += exp(first.student(a)); });
    RowSums of_row[kLanes];
    bool again[kLanes], any = false;
    for (int r = 0; r < kLanes; ++r) {
      if (!none[r]) {
        RowSums& x = of_row[r];
        x.max_s = max_s[r], x.max_t = max_t[r], x.top_t = top_t[r];
        x.sum_t = double(sums[0][r]) + sums[5][r], x.excess = sums[1][r], x.sum_s = x.sum_t + x.excess;
        if (!(x.sum_s > 0.25 * x.sum_t)) x.sum_s = of_student[r];
        x.mean_c = sums[2][r], x.bregman = sums[3][r], x.entropy = sums[4][r];
      }
      any |= again[r] = finish_sums(options, of_row[r], stats + r, values + r);
    }
    if (!any) return;
    const Row<vfloat> row = rows_of(options, stats);
    vfloat centre = {}, value = {}, sum_q = {}, mean_h = {};
    for (int r = 0; r < kLanes; ++r) centre[r] = stats[r].centre;
    sweep(s, t, 0, size, [&](vfloat a, vfloat b, int64_t, int) {
      const Pair x = pair<true>(row, a, b);
      value += term<kKind == kSoftCE ? kForwardKL : kKind>(x, options);
      sum_q += x.q;
      mean_h += x.q * slope<kKind>(x, options, centre, vfloat{});
    });
    for (int r = 0; r < kLanes; ++r) {
      if (!again[r]) continue;
      of_row[r].value = value[r], of_row[r].sum_q = sum_q[r], of_row[r].mean_h = mean_h[r];
      finish_value(options, of_row[r], stats + r, values + r);
    }
  }
}

// The gradient takes the place of s, and t is lost. upstream: of each lane. kWhole: these are all tokens of the rows,
// not a rank's part of them.
template <int kKind, bool kWhole>
void backward_block(float* s, float* t, int64_t size, Options options, const RowStats* stats, vfloat upstream) {
  if constexpr (kKind == kMSE) {
    sweep(s, t, 0, size,
          [&](vfloat a, vfloat b, int64_t i, int) { store(s + i, a == b ? vfloat{} : (a - b) * (2 * upstream)); });
  } else {
    const Row<vfloat> row = rows_of(options, stats);
    const vfloat scale = upstream * options.inverse_temperature;
    vfloat centre = {}, mean = {};
    vint none = {};
    for (int r = 0; r < kLanes; ++r) {
      centre[r] = stats[r].centre, mean[r] = stats[r].mean;
      none[r] = no_class(stats[r]) ? -1 : 0;
    }
    vfloat sum = {};
    sweep(s, t, 0, size, [&](vfloat a, vfloat b, int64_t i, int) {
      const Pair x = pair<true>(row, a, b);
      const vfloat unscaled = is_direct(kKind) ? x.difference : x.q * slope<kKind>(x, options, centre, mean);
      store(s + i, none ? vfloat{} : unscaled * scale);
      if constexpr (is_direct(kKind) && kWhole) {
        sum += unscaled * scale;
        store(t + i, x.q);
      }
    });
    // Over a whole row q - p sums to 0, but for the rounding of kappa, which multiplied all of q by one factor.
    if constexpr (is_direct(kKind) && kWhole)
      sweep(s, t, 0, size, [&](vfloat out, vfloat q, int64_t i, int) { store(s + i, none ? out : out - q * sum); });
  }
}

template <int kKind>
void forward_rows(const float* s, const float* t, int64_t rows, int64_t columns, Options options, RowStats* stats,
                  float* values, GradRequest gradient) {
  float of_s[kFewColumns * kLanes], of_t[kFewColumns * kLanes], value[kLanes];
  RowStats stat[kLanes];
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int count = int(rows - i < kLanes ? rows - i : kLanes);
    into_lanes(s + i * columns, count, columns, of_s);
    into_lanes(t + i * columns, count, columns, of_t);
    forward_block<kKind>(of_s, of_t, columns * kLanes, options, stat, value);
    std::memcpy(stats + i, stat, count * sizeof(RowStats));
    std::memcpy(values + i, value, count * sizeof(float));
    if (!gradient.out) continue;
    backward_block<kKind, true>(of_s, of_t, columns * kLanes, options, stat, splat(gradient.upstream));
    from_lanes(of_s, count, columns, gradient.out + i * columns);
  }
}

template <int kKind>
void backward_rows(const float* s, const float* t, int64_t rows, int64_t columns, Options options,
                   const RowStats* stats, const float* upstream, float* grad) {
  float of_s[kFewColumns * kLanes], of_t[kFewColumns * kLanes];
  RowStats stat[kLanes] = {};
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int count = int(rows - i < kLanes ? rows - i : kLanes);
    into_lanes(s + i * columns, count, columns, of_s);
    into_lanes(t + i * columns, count, columns, of_t);
    std::memcpy(stat, stats + i, count * sizeof(RowStats));
    backward_block<kKind, false>(of_s, of_t, columns * kLanes, options, stat, load_some(upstream + i, count, 0));
    from_lanes(of_s, count, columns, grad + i * columns);
  }
}

}  // namespace

}  // namespace fastkd::divergence
