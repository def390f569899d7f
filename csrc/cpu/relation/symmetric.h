// A long relation of x with itself: its scores are symmetric, so those above the diagonal are made once and serve both
// halves. One block of queries and one block of keys are taken at a time, on or beyond the diagonal, and the tile adds
// to both, so that both tiles of scores stay in a cache whatever the length.
//
// The largest score of a query is not known before all of its keys have been seen. Its score with itself stands in for
// it, where no other can be much larger: s_ij <= sqrt(s_ii s_jj) for any i, j. Elsewhere `run` returns false.
//
//     M = W + W^T,  dx = scale M x:  block (I, J) of M adds to rows I, and its transpose to rows J.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/relation/blocks.h"

namespace fastkd::relation {

struct Symmetric {
  struct Slice {
    float *s, *t, *dx;
    char* packed;
    Sums sums;
  };

  static constexpr float kAbove = 40.f;  // by which a score may exceed the query's own: e^40 times 1e6 keys is a float

  Inputs inputs;
  bool gradient;
  int64_t block, padded, row;
  Workspace workspace;
  BlockStats stats;
  GradientFactors factors;
  char* transposed;
  std::vector<Slice> slices;

  static bool possible(const Inputs& inputs) {
    return inputs.s.with_itself && inputs.t.with_itself && !inputs.causal && inputs.s.scale >= 0 && inputs.t.scale >= 0;
  }

  Symmetric(const Inputs& of, bool gradient, int64_t count)
      : inputs(of),
        gradient(gradient),
        block(of.block),
        padded((of.length + block - 1) / block * block),
        row((of.s.width + 15) / 16 * 16),
        slices(count) {
    workspace.allocate([&](Arena& arena) { lay_out(arena); });
  }

  void lay_out(Arena& arena) {
    inputs.s.lay_out(arena, inputs.length);
    inputs.t.lay_out(arena, inputs.length);
    stats.lay_out(arena, padded);
    const int64_t valid = gradient ? padded : 0;
    for (float** part : {&factors.max_t, &factors.max_s, &factors.p_scale, &factors.q_scale, &factors.kappa})
      *part = arena.piece<float>(valid);
    const Gemm& gemm = inputs.s.gemm;
    transposed = arena.piece<char>(valid / block * gemm.bytes_b(inputs.s.width, block));
    for (Slice& slice : slices) {
      slice.s = arena.piece<float>(block * block);
      slice.t = arena.piece<float>(block * block);
      slice.dx = arena.piece<float>(valid * row);
      slice.packed = arena.piece<char>(gradient ? gemm.bytes_a(block, block) : 0);
      float* sums = arena.piece<float>(gradient ? 0 : 5 * padded);
      slice.sums = {sums, sums + padded, sums + 2 * padded, sums + 3 * padded, sums + 4 * padded};
    }
  }

  // False: nothing was written, the scores differ too much.
  bool run(int64_t pair, const Outputs& out) {
    const ValidTokens valid = inputs.valid_tokens(pair);
    const int64_t n = valid.count();
    if (n == 0) return write_zeros(inputs, out, pair, valid), true;
    inputs.s.load_pair(pair / inputs.heads, pair % inputs.heads, valid);
    inputs.t.load_pair(pair / inputs.heads, pair % inputs.heads, valid);
    if (!gradient && !(diagonal_scores(inputs.s, n, stats.of.max_s) && diagonal_scores(inputs.t, n, stats.of.max_t)))
      return false;
    write_zeros(inputs, out, pair, valid);
    gradient ? backward(pair, valid, out) : forward(pair, valid, out);
    return true;
  }

  bool diagonal_scores(const QueriesAndKeys& side, int64_t n, float* own) const {
    inputs.table.diagonal_scores(side.queries.data, side.element, side.queries.stride, n, side.width, side.scale, own);
    std::fill(own + n, own + padded, 0.f);
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, own[i]);
    for (int64_t i = 0; i < n; ++i)
      if (!(std::sqrt(own[i]) * (std::sqrt(most) - std::sqrt(own[i])) <= kAbove)) return false;
    return true;
  }

  void forward(int64_t pair, const ValidTokens& valid, const Outputs& out) {
    const int64_t n = valid.count();
    each_slice(slices, [&](Slice& slice, int64_t k) {
      std::memset(slice.sums.t, 0, 5 * padded * sizeof(float));
      each_tile(slice, n, k, [&](const Tile& tile, int64_t i, int64_t j) {
        inputs.table.add_query_sums(tile, from(i), of(slice.sums, i));
        if (j > i) inputs.table.add_key_sums(tile, from(j), of(slice.sums, j));
      });
    });
    summed(slices, 5 * padded, [](Slice& slice) { return slice.sums.t; });
    inputs.table.values_from_sums(slices[0].sums, padded, stats.of, stats.values);
    stats.write(out, pair, inputs.length, valid, 0, n);
  }

  void backward(int64_t pair, const ValidTokens& valid, const Outputs& out) {
    const int64_t n = valid.count();
    stats.read(out, pair, inputs.length, valid, 0, n);
    stats.read_upstream(out, pair, inputs.length, valid, 0, n);
    inputs.table.gradient_factors(stats.of, stats.g, (n + kQueryLanes - 1) / kQueryLanes * kQueryLanes, factors);
    for (int64_t i = 0; i < n; i += block)
      inputs.s.pack_transposed(inputs.s.queries, i, std::min(i + block, n), piece(i));
    each_slice(slices, [&](Slice& slice, int64_t k) {
      std::memset(slice.dx, 0, padded * row * sizeof(float));
      each_tile(slice, n, k, [&](const Tile& tile, int64_t i, int64_t j) {
        inputs.table.symmetric_gradient(tile, of(factors, i), of(factors, j));
        const int64_t queries = std::min(block, n - i), width = inputs.s.width;
        const Gemm& gemm = inputs.s.gemm;
        gemm.pack_a({tile.s, kFloat32, 1, block, queries, tile.keys}, slice.packed);
        gemm.tile(slice.packed, piece(j), {queries, width, tile.keys}, {slice.dx + i * row, row, inputs.s.scale, true});
        if (j == i) return;
        gemm.pack_a({tile.s, kFloat32, block, 1, tile.keys, queries}, slice.packed);
        gemm.tile(slice.packed, piece(i), {tile.keys, width, queries}, {slice.dx + j * row, row, inputs.s.scale, true});
      });
    });
    const float* sum = summed(slices, n * row, [](Slice& slice) { return slice.dx; });
    write_rows(inputs, sum, row, valid, pair, 0, n, out.dx, out.item);
  }

  // f(tile, first query, first key): scores of both sides from the diagonal on, of every slices.size()th block from k
  // on.
  template <class F>
  void each_tile(Slice& slice, int64_t n, int64_t k, const F& f) const {
    for (int64_t i = k * block; i < n; i += int64_t(slices.size()) * block)
      for (int64_t j = i; j < n; j += block) {
        const int64_t last = std::min(i + block, n), end = std::min(j + block, n);
        inputs.s.scores(j, end, i, last, slice.s, block);
        inputs.t.scores(j, end, i, last, slice.t, block);
        f({slice.s, slice.t, block, end - j, (last - i + kQueryLanes - 1) / kQueryLanes * kQueryLanes}, i, j);
      }
  }

  char* piece(int64_t i) const { return transposed + i / block * inputs.s.gemm.bytes_b(inputs.s.width, block); }
  Stats from(int64_t i) const {
    return {stats.of.max_t + i, stats.of.sum_t + i, stats.of.max_s + i, stats.of.excess + i};
  }
  static Sums of(const Sums& x, int64_t i) { return {x.t + i, x.s + i, x.excess + i, x.bregman + i, x.cross + i}; }
  static GradientFactors of(const GradientFactors& x, int64_t i) {
    return {x.max_t + i, x.max_s + i, x.p_scale + i, x.q_scale + i, x.kappa + i};
  }
};

}  // namespace fastkd::relation
