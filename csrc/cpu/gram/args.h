// One term, a pair of layers at one level, and the work on the sums and rows of each of its groups.
#pragma once

#include <array>
#include <optional>

#include "cpu/gram/group_rows.h"

namespace fastkd::gram {

constexpr int64_t kTokenRows = 2, kSequenceRows = 3;  // fewer valid ones under a mask: the group does not count

// dL/d value: the same for all of a term's values, or one for each.
struct Upstream {
  float all = 1;
  const float* each = nullptr;
  float operator[](int64_t i) const { return each ? each[i] : all; }
};

struct GroupMask {
  const bool* data;
  int64_t of_group, of_row;  // strides
  int64_t length, enough;

  GroupMask(const std::optional<Tensor>& mask, bool sequence, int64_t length)
      : data(mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr),
        of_group(mask ? mask->stride(sequence ? 1 : 0) : 0),
        of_row(mask ? mask->stride(sequence ? 0 : 1) : 0),
        length(length),
        enough(!mask      ? 0
               : sequence ? kSequenceRows
                          : kTokenRows) {}

  // The rows of a group that count; none where there are too few.
  std::vector<int64_t> valid_rows(int64_t group) const {
    std::vector<int64_t> rows;
    rows.reserve(length);
    for (int64_t i = 0; i < length; ++i)
      if (!data || data[group * of_group + i * of_row]) rows.push_back(i);
    if (int64_t(rows.size()) < enough) rows.clear();
    return rows;
  }
};

struct Term {
  const Table& table;
  GroupRows s, t;
  GroupMask mask;
  int64_t groups, length;
  bool sequence, row, official, by_features;
  double eps;
  float* values;
  bool* valid;
  Upstream upstream;
  char* out;  // the gradient [B, N, D], or null
  int64_t out_item;
  bool add;  // to what another level has left there

  bool per_row() const { return row || official; }  // a correlation is of whole rows of a Gram, not of the Gram
};

// W = of_p P + of_q Q
struct Weights {
  double of_p = 0, of_q = 0;
};

// From the sums of products of what is correlated to 1 - rho and to its derivative times `upstream`.
inline Weights value_and_weights(double pp, double qq, double pq, double eps, float upstream, float* value) {
  const double ab = std::sqrt(pp * qq), den = ab + eps, a = std::sqrt(pp), b = std::sqrt(qq);
  *value = float((ab - pq + eps) / den);
  return {upstream * (a > 0 ? pq * b / (a * den * den) : a == 0 ? 0. : a), b == 0 ? 0. : -upstream / den};
}

inline char* out_row(const Term& term, int64_t group, int64_t i) {
  const int64_t b = term.sequence ? i : group, position = term.sequence ? group : i;
  const int64_t positions = term.sequence ? term.groups : term.length;
  return term.out + (b * positions + position) * term.s.width * term.out_item;
}

inline void write_zeros(const Term& term, int64_t group, const std::vector<int64_t>& valid) {
  if (!term.out || term.add || int64_t(valid.size()) == term.length) return;
  size_t next = 0;
  for (int64_t i = 0; i < term.length; ++i) {
    if (next < valid.size() && valid[next] == i)
      ++next;
    else
      std::memset(out_row(term, group, i), 0, term.s.width * term.out_item);
  }
}

// What one thread needs for a gradient: weights of some rows, their product with the rows, and its packed operand.
struct GradientBuffers {
  float *product, *u, *before, *ones;
  char* packed;

  GradientBuffers(Arena& arena, const GroupRows& s, int64_t rows, int64_t columns, int64_t ones_count) {
    product = arena.piece<float>(rows * s.padded);
    u = arena.piece<float>(s.padded);
    before = arena.piece<float>(s.padded);
    packed = arena.piece<char>(s.gemm.bytes_a(rows + s.gemm.rows_a, columns));
    ones = arena.piece<float>(ones_count);
  }
};

inline RowWeights allocate_row_weights(Arena& arena, int64_t count) {
  float* taken[6];
  for (float*& x : taken) x = arena.piece<float>(count);
  return {taken[0], taken[1], taken[2], taken[3], taken[4], taken[5]};
}

// product (+)= weights[rows, j..j_end) x rows j to j_end of the student; the sums of the weights are added to `sums`.
inline void multiply_rows(const GroupRows& s, float* weights, int64_t stride, int64_t rows, int64_t j, int64_t j_end,
                          int64_t block, const GradientBuffers& scratch, double* sums) {
  const int64_t columns = j_end - j;
  for (int64_t k : s.zeros)  // their weights, of size 1 / eps, would leave their rounding in the sums
    for (int64_t i = 0; j <= k && k < j_end && i < rows; ++i) weights[i * stride + k - j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double sum = s.table.sum_and_scale(weights + i * stride, gram_padded(columns), s.raw ? s.scale + j : nullptr);
    sums[i] = j == 0 ? sum : sums[i] + sum;
  }
  s.gemm.pack_a({weights, kFloat32, stride, 1, rows, columns}, scratch.packed);
  s.gemm.tile(scratch.packed, s.piece(j, block), {rows, s.width, columns}, {scratch.product, s.padded, 1, j > 0});
}

// Rows [begin, end), prepared as they lie from `rows` on.
inline void finish_rows(const Term& term, int64_t group, const std::vector<int64_t>& valid, int64_t begin, int64_t end,
                        const char* rows, int64_t row_bytes, const GradientBuffers& scratch, const double* sums) {
  const GroupRows& s = term.s;
  const int element = term.out_item == 4 ? kFloat32 : kBFloat16;
  const bool direct = element == kFloat32 && s.padded == s.width;
  const int64_t out_bytes = s.width * term.out_item;
  for (int64_t i = begin; i < end; ++i) {
    if (term.add && i + kAhead < end) fetch(out_row(term, group, valid[i + kAhead]), out_bytes);
    float* product = scratch.product + (i - begin) * s.padded;
    for (int64_t k = s.width; k < s.padded; ++k) product[k] = 0;
    auto sum = float(sums[i - begin]);
    if (s.width == 1 && s.unit_length(i)) product[0] = sum = 0;  // x / |x| of one feature is 1 or -1, whatever x is
    if (s.all_equal) {  // the weighted sum of equal rows, without what cancels on the sphere
      for (int64_t k = 0; k < s.width; ++k) product[k] = s.unit_length(i) ? 0 : s.centre[k] * sum;
      sum = 0;
    }
    const RowGradient of = {
        rows + (i - begin) * row_bytes, s.raw ? nullptr : s.centre, s.raw, s.unit_length(i), s.scale[i], sum};
    char* to = out_row(term, group, valid[i]);
    if (direct) {
      auto* floats = reinterpret_cast<float*>(to);
      term.table.input_gradient(of, s.padded, product, scratch.u, term.add ? floats : nullptr, floats);
      continue;
    }
    if (term.add) term.table.to_float32(to, element, s.width, scratch.before);
    term.table.input_gradient(of, s.padded, product, scratch.u, term.add ? scratch.before : nullptr, product);
    term.table.from_float32(product, element, s.width, to);
  }
}

}  // namespace fastkd::gram
