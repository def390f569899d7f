// Groups of more than kMostInCache rows, one after another: every thread takes strips of the same Gram, a tile of P and
// Q at a time.
#pragma once

#include <memory>

#include "cpu/gram/row_stats.h"

namespace fastkd::gram {

struct Tiled {
  Term term;
  int64_t strip, columns;  // rows and columns of a tile
  Workspace workspace;
  RowWeights weights;

  explicit Tiled(const Term& of) : term(of), strip(of.s.strip), columns(16 * of.s.strip) {
    workspace.allocate([&](Arena& arena) {
      weights = allocate_row_weights(arena, gram_padded(term.length) + kGramLanes);
      term.t.lay_out(arena, 0);
      term.s.lay_out(arena, term.out ? columns : 0);
    });
  }

  // A thread's own tiles.
  struct Tiles {
    Workspace workspace;
    int64_t stride;
    float *p, *q;
    std::unique_ptr<GradientBuffers> scratch;

    explicit Tiles(const Tiled& of) : stride(gram_padded(of.columns) + kSkew) {
      workspace.allocate([&](Arena& arena) {
        p = arena.piece<float>(of.strip * stride);
        q = arena.piece<float>(of.strip * stride);
        scratch.reset(new GradientBuffers(arena, of.term.s, of.strip, of.columns, of.term.length + kGramLanes));
      });
      for (int64_t i = 0; i < of.term.length + kGramLanes; ++i) scratch->ones[i] = 1;
    }
  };

  void compute_tiles(Tiles& tiles, int64_t i, int64_t end, int64_t j, int64_t j_end) const {
    term.t.tile(i, end, j, j_end, tiles.scratch->ones, tiles.q, tiles.stride);
    term.s.tile(i, end, j, j_end, tiles.scratch->ones, tiles.p, tiles.stride);
  }

  // f(tiles, strip's number, i, end, j, j_end) for tiles [i, end) x [j, j_end) of all strips; `upper`: of what is not
  // below the diagonal.
  template <class F>
  void for_tiles(int64_t n, bool upper, const F& f) const {
    const int64_t strips = (n + strip - 1) / strip;
    parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
      Tiles tiles(*this);
      for (int64_t at = first; at < last; ++at) {  // alternately a long and a short strip of the upper triangle
        const int64_t which = at % 2 ? strips - 1 - at / 2 : at / 2, i = which * strip;
        const int64_t end = i + strip < n ? i + strip : n;
        for (int64_t j = upper ? i : 0; j < n; j += columns) {
          const int64_t j_end = j + columns < n ? j + columns : n;
          compute_tiles(tiles, i, end, j, j_end);
          f(tiles, which, i, end, j, j_end);
        }
      }
    });
  }

  int64_t prepare(int64_t group, const std::vector<int64_t>& valid) {
    term.t.prepare(group, valid, true);
    term.s.prepare(group, valid, true);
    return int64_t(valid.size());
  }

  Weights correlate(int64_t group, int64_t n) const {
    using Sums = std::array<double, 3>;
    std::vector<Sums> of_strip((n + strip - 1) / strip);
    for_tiles(n, true, [&](Tiles& tiles, int64_t which, int64_t i, int64_t end, int64_t j, int64_t j_end) {
      term.table.add_moments(tiles.p, tiles.q, tiles.stride, end - i, gram_padded(j_end - j), j == i ? strip : 0,
                             of_strip[which].data());
    });
    Sums sums = {};
    for (const Sums& part : of_strip)
      for (int k = 0; k < 3; ++k) sums[k] += part[k];
    return value_and_weights(sums[0], sums[1], sums[2], term.eps, term.upstream[group], term.values + group);
  }

  std::vector<Moments> moments_of_rows(int64_t n) const {
    std::vector<Moments> found(n);
    for_tiles(n, false, [&](Tiles& tiles, int64_t, int64_t i, int64_t end, int64_t j, int64_t j_end) {
      for (int64_t k = i; k < end; ++k) {
        const int64_t at = (k - i) * tiles.stride;
        merge(found[k], term.table.row_moments(tiles.p + at, tiles.q + at, j_end - j));
      }
    });
    return found;
  }

  void run(int64_t group) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    start_group(term, group, valid);
    if (valid.empty()) return;
    const int64_t n = prepare(group, valid);
    if (term.row) {
      const std::vector<Moments> found = moments_of_rows(n);
      for (int64_t i = 0; i < n; ++i) conclude_row(term, group * term.length + valid[i], found[i], weights, i);
    } else {
      fill_rows(weights, 0, n, correlate(group, n));
    }
    if (term.out) gradient(group, valid);
  }

  void measure_rows(int64_t group, Moments* found) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    write_zeros(term, group, valid);
    if (valid.empty()) return;
    const int64_t n = prepare(group, valid);
    const double levels[2] = {term.s.level, term.t.level};
    const std::vector<Moments> of_line = moments_of_rows(n);
    for (int64_t i = 0; i < n; ++i) found[valid[i]] = with_levels(term, of_line[i], i, levels);
  }
  void apply_official(int64_t group, const OfficialGroups& groups) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    if (valid.empty()) return;
    const int64_t n = prepare(group, valid);
    const double levels[2] = {term.s.level, term.t.level};
    for (int64_t i = 0; i < n; ++i) groups.set_weights(group, valid[i], levels, weights, i);
    gradient(group, valid);
  }

  void gradient(int64_t group, const std::vector<int64_t>& valid) {
    const int64_t n = int64_t(valid.size());
    fill_rows(weights, n, gram_padded(n), {});
    term.s.pack_transposed(n, columns, true);
    std::vector<double> sums(gram_padded(n) + strip);
    for_tiles(n, false, [&](Tiles& tiles, int64_t, int64_t i, int64_t end, int64_t j, int64_t j_end) {
      term.table.symmetric_weights(tiles.p, tiles.q, tiles.stride, end - i, j_end - j, weights.from(i),
                                   weights.from(j));
      multiply_rows(term.s, tiles.p, tiles.stride, end - i, j, j_end, columns, *tiles.scratch, sums.data() + i);
      if (j_end == n)
        finish_rows(term, group, valid, i, end, term.s.row(i), term.s.row_bytes(), *tiles.scratch, sums.data() + i);
    });
  }
};

}  // namespace fastkd::gram
