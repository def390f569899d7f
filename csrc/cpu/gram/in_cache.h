// Groups of at most kMostInCache rows: P and Q lie in the thread's workspace, where the two sides share one place.
#pragma once

#include <memory>

#include "cpu/gram/row_stats.h"
#include "cpu/simd/transpose.h"

namespace fastkd::gram {

// Rows [begin, end) of a symmetric matrix, from column `end` on, are written to where they stand as columns. Strips are
// made of whole blocks of kTransposeLanes rows: only the last one is not, and it has no columns to write.
inline void fill_lower_triangle(float* matrix, int64_t stride, int64_t begin, int64_t end, int64_t size) {
  chosen_transpose_table().transpose(matrix + begin * stride + end, stride, end - begin, size - end,
                                     matrix + end * stride + begin, stride);
}

struct InCache {
  Term term;  // a copy: the sides point into this thread's scratch
  int64_t stride, block;
  Workspace workspace;
  float *p, *q;
  RowWeights weights;
  std::unique_ptr<GradientBuffers> scratch;

  explicit InCache(const Term& of) : term(of), stride(gram_padded(of.length) + kSkew), block(gram_padded(of.length)) {
    workspace.allocate([&](Arena& arena) { lay_out(arena); });
    for (int64_t i = 0; i < stride; ++i) scratch->ones[i] = 1;
  }

  void lay_out(Arena& arena) {
    p = arena.piece<float>(term.length * stride);
    q = arena.piece<float>(term.length * stride);
    weights = allocate_row_weights(arena, stride);
    scratch.reset(new GradientBuffers(arena, term.s, term.s.strip, block, stride));
    Arena for_student = arena;
    term.t.lay_out(arena, 0);
    term.s.lay_out(for_student, term.out ? block : 0);
    arena.used = arena.used > for_student.used ? arena.used : for_student.used;
  }

  // P and Q of the group, their upper triangles or (per row) all of them; `levels`: the means that were subtracted.
  void compute_grams(int64_t group, const std::vector<int64_t>& valid, double levels[2]) {
    const int64_t n = int64_t(valid.size());
    for (int side = 1; side >= 0; --side) {  // the teacher's rows make room for the student's
      GroupRows& x = side ? term.t : term.s;
      float* out = side ? q : p;
      x.prepare(group, valid, false);
      each(false, n, x.strip, [&](int64_t i, int64_t end) {
        x.tile(i, end, i, n, scratch->ones, out + i * stride + i, stride);
        if (term.per_row()) fill_lower_triangle(out, stride, i, end, n);
      });
      levels[side] = x.level;
    }
  }

  Weights correlate(int64_t group, int64_t n) {
    std::array<double, 3> sums = {};
    each(false, n, term.s.strip, [&](int64_t i, int64_t end) {
      const int64_t at = i * stride + i;
      term.table.add_moments(p + at, q + at, stride, end - i, gram_padded(n - i), term.s.strip, sums.data());
    });
    const Weights moments =
        value_and_weights(sums[0], sums[1], sums[2], term.eps, term.upstream[group], term.values + group);
    return n == 1 ? Weights{} : moments;  // of one row what is left of P and Q is rounding
  }

  void run(int64_t group) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    const int64_t n = int64_t(valid.size());
    start_group(term, group, valid);
    if (n == 0) return;
    double levels[2];
    compute_grams(group, valid, levels);
    if (term.row) {
      for (int64_t i = 0; i < n; ++i)
        conclude_row(term, group * term.length + valid[i], term.table.row_moments(p + i * stride, q + i * stride, n),
                     weights, i);
    } else {
      fill_rows(weights, 0, n, correlate(group, n));
    }
    if (term.out) gradient(group, valid);
  }

  // The two passes of the released code's groups, which straddle positions.
  void measure_rows(int64_t group, Moments* moments) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    const int64_t n = int64_t(valid.size());
    write_zeros(term, group, valid);
    if (n == 0) return;
    double levels[2];
    compute_grams(group, valid, levels);
    for (int64_t i = 0; i < n; ++i)
      moments[valid[i]] = with_levels(term, term.table.row_moments(p + i * stride, q + i * stride, n), i, levels);
  }
  void apply_official(int64_t group, const OfficialGroups& groups) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    if (valid.empty()) return;
    double levels[2];
    compute_grams(group, valid, levels);
    for (size_t i = 0; i < valid.size(); ++i) groups.set_weights(group, valid[i], levels, weights, int64_t(i));
    gradient(group, valid);
  }

  void gradient(int64_t group, const std::vector<int64_t>& valid) {
    const int64_t n = int64_t(valid.size());
    const bool all = term.per_row();
    fill_rows(weights, n, gram_padded(n), {});
    term.s.pack_transposed(n, block, false);
    each(false, n, term.s.strip, [&](int64_t i, int64_t end) {
      const int64_t j = all ? 0 : i, at = i * stride + j;
      term.table.symmetric_weights(p + at, q + at, stride, end - i, n - j, weights.from(i), weights.from(j));
      if (!all) fill_lower_triangle(p, stride, i, end, n);
    });
    std::vector<double> sums(term.s.strip);
    each(false, n, term.s.strip, [&](int64_t i, int64_t end) {
      multiply_rows(term.s, p + i * stride, stride, end - i, 0, n, block, *scratch, sums.data());
      finish_rows(term, group, valid, i, end, term.s.row(i), term.s.row_bytes(), *scratch, sums.data());
    });
  }
};

}  // namespace fastkd::gram
