// One term: a pair of layers at one level, and what is to be done with each group's sums and rows.
#pragma once

#include <array>
#include <optional>

#include "cpu/gram/side.h"

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
  std::vector<int64_t> kept(int64_t group) const {
    std::vector<int64_t> found;
    found.reserve(length);
    for (int64_t i = 0; i < length; ++i)
      if (!data || data[group * of_group + i * of_row]) found.push_back(i);
    if (int64_t(found.size()) < enough) found.clear();
    return found;
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

  bool by_line() const { return row || official; }  // a correlation is of whole rows of a Gram, not of the Gram
};

// W = of_p P + of_q Q
struct Weights {
  double of_p = 0, of_q = 0;
};

// From the sums of products of what is correlated to 1 - rho and to its derivative times `upstream`.
inline Weights conclude(double pp, double qq, double pq, double eps, float upstream, float* value) {
  const double ab = std::sqrt(pp * qq), den = ab + eps, a = std::sqrt(pp), b = std::sqrt(qq);
  *value = float((ab - pq + eps) / den);
  return {upstream * (a > 0 ? pq * b / (a * den * den) : a == 0 ? 0. : a), b == 0 ? 0. : -upstream / den};
}

inline char* out_row(const Term& call, int64_t group, int64_t i) {
  const int64_t b = call.sequence ? i : group, position = call.sequence ? group : i;
  const int64_t positions = call.sequence ? call.groups : call.length;
  return call.out + (b * positions + position) * call.s.width * call.out_item;
}

inline void write_zeros(const Term& call, int64_t group, const std::vector<int64_t>& kept) {
  if (!call.out || call.add || int64_t(kept.size()) == call.length) return;
  size_t next = 0;
  for (int64_t i = 0; i < call.length; ++i) {
    if (next < kept.size() && kept[next] == i)
      ++next;
    else
      std::memset(out_row(call, group, i), 0, call.s.width * call.out_item);
  }
}

// What one thread needs for a gradient: weights of some rows, their product with the rows, and its packed operand.
struct Scratch {
  float *pull, *u, *before, *ones;
  char* packed;

  Scratch(Arena& arena, const GroupRows& s, int64_t rows, int64_t columns, int64_t ones_count) {
    pull = arena.take<float>(rows * s.padded);
    u = arena.take<float>(s.padded);
    before = arena.take<float>(s.padded);
    packed = arena.take<char>(s.gemm.bytes_a(rows + s.gemm.rows_a, columns));
    ones = arena.take<float>(ones_count);
  }
};

inline RowWeights take_lines(Arena& arena, int64_t count) {
  float* taken[6];
  for (float*& x : taken) x = arena.take<float>(count);
  return {taken[0], taken[1], taken[2], taken[3], taken[4], taken[5]};
}

// pull (+)= weights[rows, j..j_end) x rows j to j_end of the student; their sums are added up.
inline void pull_rows(const GroupRows& s, float* weights, int64_t stride, int64_t rows, int64_t j, int64_t j_end,
                      int64_t block, const Scratch& scratch, double* sums) {
  const int64_t columns = j_end - j;
  for (int64_t k : s.zeros)  // their weights, of size 1 / eps, would leave their rounding in the sums
    for (int64_t i = 0; j <= k && k < j_end && i < rows; ++i) weights[i * stride + k - j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double sum = s.table.weigh(weights + i * stride, gram_padded(columns), s.raw ? s.scale + j : nullptr);
    sums[i] = j == 0 ? sum : sums[i] + sum;
  }
  s.gemm.pack_a({weights, kFloat32, stride, 1, rows, columns}, scratch.packed);
  s.gemm.tile(scratch.packed, s.piece(j, block), {rows, s.width, columns}, {scratch.pull, s.padded, 1, j > 0});
}

// Rows [begin, end), prepared as they lie from `rows` on.
inline void finish_rows(const Term& call, int64_t group, const std::vector<int64_t>& kept, int64_t begin, int64_t end,
                        const char* rows, int64_t row_bytes, const Scratch& scratch, const double* sums) {
  const GroupRows& s = call.s;
  const int element = call.out_item == 4 ? kFloat32 : kBFloat16;
  const bool direct = element == kFloat32 && s.padded == s.width;
  const int64_t out_bytes = s.width * call.out_item;
  for (int64_t i = begin; i < end; ++i) {
    if (call.add && i + kAhead < end) fetch(out_row(call, group, kept[i + kAhead]), out_bytes);
    float* pull = scratch.pull + (i - begin) * s.padded;
    for (int64_t k = s.width; k < s.padded; ++k) pull[k] = 0;
    auto sum = float(sums[i - begin]);
    if (s.width == 1 && s.live(i)) pull[0] = sum = 0;  // x / |x| of one feature is 1 or -1, whatever x is
    if (s.equal) {  // the weighted sum of equal rows, without what cancels on the sphere
      for (int64_t k = 0; k < s.width; ++k) pull[k] = s.live(i) ? 0 : s.centre[k] * sum;
      sum = 0;
    }
    const RowGradient of = {
        rows + (i - begin) * row_bytes, s.raw ? nullptr : s.centre, s.raw, s.live(i), s.scale[i], sum};
    char* to = out_row(call, group, kept[i]);
    if (direct) {
      auto* floats = reinterpret_cast<float*>(to);
      call.table.finish(of, s.padded, pull, scratch.u, call.add ? floats : nullptr, floats);
      continue;
    }
    if (call.add) call.table.widen(to, element, s.width, scratch.before);
    call.table.finish(of, s.padded, pull, scratch.u, call.add ? scratch.before : nullptr, pull);
    call.table.narrow(pull, element, s.width, to);
  }
}

}  // namespace fastkd::gram
