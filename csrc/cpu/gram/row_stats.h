// The statistics and weights of single rows of P and Q: one correlation is of all rows of a matrix, of one row each
// (row-wise), or, in the released code, of many: there row (n, a) of the buffer [N, B, B] belongs to group (n B + a) /
// N.
#pragma once

#include "cpu/gram/args.h"

namespace fastkd::gram {

inline void set_row(const RowWeights& row_weights, int64_t i, Weights weights, double mean_p, double mean_q) {
  const double along = weights.of_q == 0 ? 0 : -weights.of_p / weights.of_q;
  row_weights.of_q[i] = float(weights.of_q);
  row_weights.high[i] = float(along);
  row_weights.low[i] = float(along - double(row_weights.high[i]));
  row_weights.mean_p[i] = float(mean_p);
  row_weights.mean_q[i] = float(mean_q);
  row_weights.rest[i] =
      float(along * (mean_p - double(row_weights.mean_p[i])) - (mean_q - double(row_weights.mean_q[i])));
}

// The same weights for rows [begin, end), whose means are 0.
inline void fill_rows(const RowWeights& row_weights, int64_t begin, int64_t end, Weights weights) {
  for (int64_t i = begin; i < end; ++i) set_row(row_weights, i, weights, 0, 0);
}

// A row of zeros has a constant row of the Gram, whose moments about its mean are 0; the mean itself may be rounded.
inline Moments without_rounding(const Term& term, Moments of, int64_t i) {
  if (term.s.is_zero(i)) of.pp = of.pq = 0;
  if (term.t.is_zero(i)) of.qq = of.pq = 0;
  return of;
}

// Row-wise: `place` is the row's among the values.
inline void conclude_row(const Term& term, int64_t value_index, const Moments& row, const RowWeights& row_weights,
                         int64_t i) {
  const Moments of = without_rounding(term, row, i);
  const Weights weights =
      value_and_weights(of.pp, of.qq, of.pq, term.eps, term.upstream[value_index], term.values + value_index);
  set_row(row_weights, i, of.count == 1 ? Weights{} : weights, of.mean_p, of.mean_q);
}

// What a group begins with: its values are there (0 where nothing counts), and so are the rows that have no gradient.
inline void start_group(const Term& term, int64_t group, const std::vector<int64_t>& valid) {
  write_zeros(term, group, valid);
  if (!term.row) {
    term.valid[group] = !valid.empty();
    term.values[group] = 0;
    return;
  }
  for (int64_t i = 0; i < term.length; ++i) {
    term.valid[group * term.length + i] = false;
    term.values[group * term.length + i] = 0;
  }
  for (int64_t i : valid) term.valid[group * term.length + i] = true;
}

// The moments with means of the entries themselves: `levels` are the means that were subtracted from P and Q.
using Moments = Moments;

inline Moments with_levels(const Term& term, const Moments& row, int64_t i, const double levels[2]) {
  Moments of = without_rounding(term, row, i);
  of.mean_p += levels[0];
  of.mean_q += levels[1];
  return of;
}

inline void merge(Moments& into, const Moments& other) {
  if (other.count == 0) return;
  const double count = into.count + other.count, share = into.count * other.count / count;
  const double p = other.mean_p - into.mean_p, q = other.mean_q - into.mean_q;
  into.pp += other.pp + p * p * share;
  into.qq += other.qq + q * q * share;
  into.pq += other.pq + p * q * share;
  into.mean_p += p * other.count / count;
  into.mean_q += q * other.count / count;
  into.count = count;
}

// The released code's groups: as many as there are sequences, of as many rows each as there are positions.
struct OfficialGroups {
  int64_t sequences, positions;
  std::vector<Moments> rows;  // [positions, sequences]
  std::vector<Moments> groups;
  std::vector<Weights> weights;

  OfficialGroups(int64_t sequences, int64_t positions)
      : sequences(sequences),
        positions(positions),
        rows(sequences * positions),
        groups(sequences),
        weights(sequences) {}

  void conclude_all(const Term& term) {
    for (size_t row = 0; row < rows.size(); ++row) merge(groups[row / positions], rows[row]);
    for (int64_t g = 0; g < sequences; ++g) {
      const Moments& of = groups[g];
      term.valid[g] = of.count > 0;
      term.values[g] = 0;
      if (of.count == 0) continue;
      weights[g] = value_and_weights(of.pp, of.qq, of.pq, term.eps, term.upstream[g], term.values + g);
      if (term.s.normalize && sequences == 1) weights[g] = {};  // all entries are 1: what is left is rounding
    }
  }

  // The weights of the i-th valid row at a position; `sequence` is its place among all of them.
  void set_weights(int64_t position, int64_t sequence, const double levels[2], const RowWeights& row_weights,
                   int64_t i) const {
    const int64_t g = (position * sequences + sequence) / positions;
    set_row(row_weights, i, weights[g], groups[g].mean_p - levels[0], groups[g].mean_q - levels[1]);
  }
};

}  // namespace fastkd::gram
