// Groups of at most kWhole rows: P and Q lie in a scratch of their own, and the sides one after the other in another.
#pragma once

#include <memory>

#include "cpu/gram/row_stats.h"

namespace fastkd::gram {

struct Whole {
  Term call;  // a copy: the sides point into this thread's scratch
  int64_t stride, block;
  Memory memory;
  float *p, *q;
  RowWeights lines;
  std::unique_ptr<Scratch> scratch;

  explicit Whole(const Term& of) : call(of), stride(gram_padded(of.length) + kSkew), block(gram_padded(of.length)) {
    memory.fill([&](Arena& arena) { carve(arena); });
    for (int64_t i = 0; i < stride; ++i) scratch->ones[i] = 1;
  }

  void carve(Arena& arena) {
    p = arena.take<float>(call.length * stride);
    q = arena.take<float>(call.length * stride);
    lines = take_lines(arena, stride);
    scratch.reset(new Scratch(arena, call.s, call.s.strip, block, stride));
    Arena again = arena;
    call.t.carve(arena, 0);
    call.s.carve(again, call.out ? block : 0);
    arena.used = arena.used > again.used ? arena.used : again.used;
  }

  // P and Q of the group, their upper triangles or (by line) all of them; `levels`: the means that they lost.
  void make(int64_t group, const std::vector<int64_t>& kept, double levels[2]) {
    const int64_t n = int64_t(kept.size());
    for (int side = 1; side >= 0; --side) {  // the teacher's rows make room for the student's
      GroupRows& x = side ? call.t : call.s;
      float* out = side ? q : p;
      x.prepare(group, kept, false);
      each(false, n, x.strip, [&](int64_t i, int64_t end) {
        x.tile(i, end, i, n, scratch->ones, out + i * stride + i, stride);
        if (call.by_line()) call.table.mirror(out, stride, i, end, n);
      });
      levels[side] = x.level;
    }
  }

  Weights correlate(int64_t group, int64_t n) {
    std::array<double, 3> sums = {};
    each(false, n, call.s.strip, [&](int64_t i, int64_t end) {
      const int64_t at = i * stride + i;
      call.table.moments(p + at, q + at, stride, end - i, gram_padded(n - i), call.s.strip, sums.data());
    });
    const Weights found = conclude(sums[0], sums[1], sums[2], call.eps, call.upstream[group], call.values + group);
    return n == 1 ? Weights{} : found;  // of one row what is left of P and Q is rounding
  }

  void run(int64_t group) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    const int64_t n = int64_t(kept.size());
    start_group(call, group, kept);
    if (n == 0) return;
    double levels[2];
    make(group, kept, levels);
    if (call.row) {
      for (int64_t i = 0; i < n; ++i)
        conclude_row(call, group * call.length + kept[i], call.table.line(p + i * stride, q + i * stride, n), lines, i);
    } else {
      fill_lines(lines, 0, n, correlate(group, n));
    }
    if (call.out) gradient(group, kept);
  }

  // The two passes of the released code's groups, which straddle positions.
  void measure(int64_t group, LineSums* found) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    const int64_t n = int64_t(kept.size());
    write_zeros(call, group, kept);
    if (n == 0) return;
    double levels[2];
    make(group, kept, levels);
    for (int64_t i = 0; i < n; ++i)
      found[kept[i]] = line_sums(call, call.table.line(p + i * stride, q + i * stride, n), i, levels);
  }
  void apply(int64_t group, const OfficialGroups& groups) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    if (kept.empty()) return;
    double levels[2];
    make(group, kept, levels);
    for (size_t i = 0; i < kept.size(); ++i) groups.line(group, kept[i], levels, lines, int64_t(i));
    gradient(group, kept);
  }

  void gradient(int64_t group, const std::vector<int64_t>& kept) {
    const int64_t n = int64_t(kept.size());
    const bool all = call.by_line();
    fill_lines(lines, n, gram_padded(n), {});
    call.s.turn(n, block, false);
    each(false, n, call.s.strip, [&](int64_t i, int64_t end) {
      const int64_t j = all ? 0 : i, at = i * stride + j;
      call.table.combine(p + at, q + at, stride, end - i, n - j, lines.from(i), lines.from(j));
      if (!all) call.table.mirror(p, stride, i, end, n);
    });
    std::vector<double> sums(call.s.strip);
    each(false, n, call.s.strip, [&](int64_t i, int64_t end) {
      pull_rows(call.s, p + i * stride, stride, end - i, 0, n, block, *scratch, sums.data());
      finish_rows(call, group, kept, i, end, call.s.row(i), call.s.row_bytes(), *scratch, sums.data());
    });
  }
};

}  // namespace fastkd::gram
