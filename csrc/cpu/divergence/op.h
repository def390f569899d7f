#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::divergence {

// The order of fastkd.checks.KINDS.
enum Kind : int { kForwardKL, kReverseKL, kSkewKL, kJSD, kTVD, kSoftCE, kMSE, kKinds };

struct Options {
  int kind;
  float inverse_temperature;
  float mix;   // weight of the student in the mixture m = rest p + mix q: 1 - alpha (skew_kl), 1 - beta (jsd)
  float rest;  // 1 - mix, subtracted in double: of a mix near 1 a float keeps no digits of it
};

// What the forward leaves to the backward, per row: p = e^((t - max_t) / T) / sum_t, log(q / p) = c - kappa with
// c = ((s - t) - (max_s - max_t)) / T, and the gradient of the row is q ((h - centre) - mean) / T with the kind's own
// h; centre is the h of the student's likeliest token, mean that of h - centre under q.
struct RowStats {
  float max_s, max_t, sum_s, sum_t, kappa, centre, mean;
};

// A gradient that is wanted with the value: of upstream * value. `scratch`: scratch_size(columns) floats of the
// caller's.
struct GradRequest {
  float* out;  // null: not wanted
  float* scratch;
  float upstream;

  static int64_t scratch_size(int64_t columns) { return columns + columns / 256 + 2; }
};

// A row so far, where its logits come in parts: the maxima yet seen, and sums relative to them (of e^s, e^t, e^t
// expm1(c), e^t c, e^t (expm1(c) - c), -e^t t). Where `log_sum_gap` is known, about T (logsumexp(s / T) - logsumexp(t /
// T)), max_s is max_t + log_sum_gap instead of the student's maximum: that makes c, and with it kappa, small. Then of a
// second look at the row: the value, q and q (h - centre).
struct RowSums {
  float max_s = -__builtin_inff(), max_t = -__builtin_inff();
  double log_sum_gap = __builtin_nan("");
  float top_t = 0;  // the teacher's logit where the student's is max_s
  double sum_s = 0, sum_t = 0, excess = 0, mean_c = 0, bregman = 0, entropy = 0;
  double value = 0, sum_q = 0, mean_h = 0;
};

struct Table {
  // Up to so many columns forward_rows and backward_rows are faster, and may be called.
  int64_t few_columns;
  float (*forward)(const float* s, const float* t, int64_t columns, Options options, RowStats* stats,
                   GradRequest gradient);
  void (*backward)(const float* s, const float* t, int64_t columns, Options options, const RowStats& stats,
                   float upstream, float* grad);
  // Rows of at most `few_columns`, all of them at once. upstream: of each row.
  void (*forward_rows)(const float* s, const float* t, int64_t rows, int64_t columns, Options options, RowStats* stats,
                       float* values, GradRequest gradient);
  void (*backward_rows)(const float* s, const float* t, int64_t rows, int64_t columns, Options options,
                        const RowStats* stats, const float* upstream, float* grad);
  // The forward in parts: accumulate_part() for each part of the row, then finish_sums(); where that returns true,
  // refine_part() for each part again, and finish_value().
  void (*accumulate_part)(const float* s, const float* t, int64_t columns, Options options, RowSums* sums);
  bool (*finish_sums)(Options options, const RowSums& sums, RowStats* stats, float* value);
  void (*refine_part)(const float* s, const float* t, int64_t columns, Options options, const RowStats& stats,
                      RowSums* sums);
  void (*finish_value)(Options options, const RowSums& sums, RowStats* stats, float* value);
  // For the sparse teacher: parts of softmax(s / T). The sum is of e^((s - largest) / T), in double; log_sum and
  // lacking are T logsumexp(s / T) as two floats.
  float (*largest)(const float* s, int64_t columns);
  double (*sum_of_exponentials)(const float* s, int64_t columns, double inverse_temperature, float largest);
  void (*scaled_softmax)(const float* s, int64_t columns, float inverse_temperature, float log_sum, float log_sum_low,
                         float scale, float* out);
  // Rows in half precision, to floats and back.
  const float* (*as_floats)(const void* row, int element, float* scratch, int64_t count);
  void (*narrow)(const float* in, int element, void* out, int64_t count);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::divergence
