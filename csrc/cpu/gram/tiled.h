// Groups of more than kWhole rows, one after another: every thread takes strips of the same Gram, a tile of P and Q at
// a time.
#pragma once

#include <memory>

#include "cpu/gram/row_stats.h"

namespace fastkd::gram {

struct Long {
  Term call;
  int64_t strip, columns;  // rows and columns of a tile
  Memory memory;
  RowWeights lines;

  explicit Long(const Term& of) : call(of), strip(of.s.strip), columns(16 * of.s.strip) {
    memory.fill([&](Arena& arena) {
      lines = take_lines(arena, gram_padded(call.length) + kGramLanes);
      call.t.carve(arena, 0);
      call.s.carve(arena, call.out ? columns : 0);
    });
  }

  // A thread's own tiles.
  struct Tiles {
    Memory memory;
    int64_t stride;
    float *p, *q;
    std::unique_ptr<Scratch> scratch;

    explicit Tiles(const Long& of) : stride(gram_padded(of.columns) + kSkew) {
      memory.fill([&](Arena& arena) {
        p = arena.take<float>(of.strip * stride);
        q = arena.take<float>(of.strip * stride);
        scratch.reset(new Scratch(arena, of.call.s, of.strip, of.columns, of.call.length + kGramLanes));
      });
      for (int64_t i = 0; i < of.call.length + kGramLanes; ++i) scratch->ones[i] = 1;
    }
  };

  void make(Tiles& tiles, int64_t i, int64_t end, int64_t j, int64_t j_end) const {
    call.t.tile(i, end, j, j_end, tiles.scratch->ones, tiles.q, tiles.stride);
    call.s.tile(i, end, j, j_end, tiles.scratch->ones, tiles.p, tiles.stride);
  }

  // f(tiles, strip's number, i, end, j, j_end) for tiles [i, end) x [j, j_end) of all strips; `upper`: of what is not
  // below the diagonal.
  template <class F>
  void for_tiles(int64_t n, bool upper, const F& f) const {
    const int64_t strips = (n + strip - 1) / strip;
    parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
      Tiles tiles(*this);
      for (int64_t at = first; at < last; ++at) {  // a long and a short one by turns: the upper triangle's strips
        const int64_t which = at % 2 ? strips - 1 - at / 2 : at / 2, i = which * strip;
        const int64_t end = i + strip < n ? i + strip : n;
        for (int64_t j = upper ? i : 0; j < n; j += columns) {
          const int64_t j_end = j + columns < n ? j + columns : n;
          make(tiles, i, end, j, j_end);
          f(tiles, which, i, end, j, j_end);
        }
      }
    });
  }

  int64_t prepare(int64_t group, const std::vector<int64_t>& kept) {
    call.t.prepare(group, kept, true);
    call.s.prepare(group, kept, true);
    return int64_t(kept.size());
  }

  Weights correlate(int64_t group, int64_t n) const {
    using Sums = std::array<double, 3>;
    std::vector<Sums> of_strip((n + strip - 1) / strip);
    for_tiles(n, true, [&](Tiles& tiles, int64_t which, int64_t i, int64_t end, int64_t j, int64_t j_end) {
      call.table.moments(tiles.p, tiles.q, tiles.stride, end - i, gram_padded(j_end - j), j == i ? strip : 0,
                         of_strip[which].data());
    });
    Sums sums = {};
    for (const Sums& part : of_strip)
      for (int k = 0; k < 3; ++k) sums[k] += part[k];
    return conclude(sums[0], sums[1], sums[2], call.eps, call.upstream[group], call.values + group);
  }

  std::vector<Moments> every_line(int64_t n) const {
    std::vector<Moments> found(n);
    for_tiles(n, false, [&](Tiles& tiles, int64_t, int64_t i, int64_t end, int64_t j, int64_t j_end) {
      for (int64_t k = i; k < end; ++k) {
        const int64_t at = (k - i) * tiles.stride;
        merge(found[k], call.table.line(tiles.p + at, tiles.q + at, j_end - j));
      }
    });
    return found;
  }

  void run(int64_t group) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    start_group(call, group, kept);
    if (kept.empty()) return;
    const int64_t n = prepare(group, kept);
    if (call.row) {
      const std::vector<Moments> found = every_line(n);
      for (int64_t i = 0; i < n; ++i) conclude_row(call, group * call.length + kept[i], found[i], lines, i);
    } else {
      fill_lines(lines, 0, n, correlate(group, n));
    }
    if (call.out) gradient(group, kept);
  }

  void measure(int64_t group, LineSums* found) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    write_zeros(call, group, kept);
    if (kept.empty()) return;
    const int64_t n = prepare(group, kept);
    const double levels[2] = {call.s.level, call.t.level};
    const std::vector<Moments> of_line = every_line(n);
    for (int64_t i = 0; i < n; ++i) found[kept[i]] = line_sums(call, of_line[i], i, levels);
  }
  void apply(int64_t group, const OfficialGroups& groups) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    if (kept.empty()) return;
    const int64_t n = prepare(group, kept);
    const double levels[2] = {call.s.level, call.t.level};
    for (int64_t i = 0; i < n; ++i) groups.line(group, kept[i], levels, lines, i);
    gradient(group, kept);
  }

  void gradient(int64_t group, const std::vector<int64_t>& kept) {
    const int64_t n = int64_t(kept.size());
    fill_lines(lines, n, gram_padded(n), {});
    call.s.turn(n, columns, true);
    std::vector<double> sums(gram_padded(n) + strip);
    for_tiles(n, false, [&](Tiles& tiles, int64_t, int64_t i, int64_t end, int64_t j, int64_t j_end) {
      call.table.combine(tiles.p, tiles.q, tiles.stride, end - i, j_end - j, lines.from(i), lines.from(j));
      pull_rows(call.s, tiles.p, tiles.stride, end - i, j, j_end, columns, *tiles.scratch, sums.data() + i);
      if (j_end == n)
        finish_rows(call, group, kept, i, end, call.s.row(i), call.s.row_bytes(), *tiles.scratch, sums.data() + i);
    });
  }
};

}  // namespace fastkd::gram
