// The work on one (sequence, head) of a relation: all of its scores where they fit in the cache, or a block of
// queries at a time. The mathematics is in relation/op.cpp.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/relation/queries_and_keys.h"
#include "cpu/simd/transpose.h"

namespace fastkd::relation {

// Everything [B·H, …]; dx and dy null where no gradient is wanted, upstream null for 1.
struct Outputs {
  float *values, *stats;  // stats [4][L] per (sequence, head)
  char *dx, *dy;
  int64_t item;
  const float* upstream;
};

struct Inputs {
  const Table& table;
  const TransposeTable& transposes;
  QueriesAndKeys s, t;
  const bool* mask;
  int64_t mask_batch, mask_token;
  bool causal;
  int64_t heads, length, block;  // block: queries at a time, a multiple of every panel

  ValidTokens valid_tokens(int64_t pair) const {
    return {mask ? mask + pair / heads * mask_batch : nullptr, mask_token, length};
  }
};

// The statistics of a block of queries.
struct BlockStats {
  Stats of;
  float *values, *g;

  void lay_out(Arena& arena, int64_t block) {
    of = {arena.piece<float>(block), arena.piece<float>(block), arena.piece<float>(block), arena.piece<float>(block)};
    values = arena.piece<float>(block);
    g = arena.piece<float>(block);
  }

  float* part(int k) const { return k == 0 ? of.max_t : k == 1 ? of.sum_t : k == 2 ? of.max_s : of.excess; }

  // Queries [first, last) of a (sequence, head).
  void write(const Outputs& out, int64_t pair, int64_t length, const ValidTokens& valid, int64_t first,
             int64_t last) const {
    for (int64_t i = first; i < last; ++i) {
      if (out.values) out.values[pair * length + valid.tokens[i]] = values[i - first];
      if (out.stats)
        for (int k = 0; k < 4; ++k) out.stats[(pair * 4 + k) * length + valid.tokens[i]] = part(k)[i - first];
    }
  }
  void read(const Outputs& out, int64_t pair, int64_t length, const ValidTokens& valid, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int k = 0; k < 4; ++k) part(k)[i - first] = out.stats[(pair * 4 + k) * length + valid.tokens[i]];
  }
  void read_upstream(const Outputs& out, int64_t pair, int64_t length, const ValidTokens& valid, int64_t first,
                     int64_t last) {
    for (int64_t i = first; i < last; ++i)
      g[i - first] = out.upstream ? out.upstream[pair * length + valid.tokens[i]] : 1;
  }
};

// The value and the gradient of a masked token are 0.
inline void write_zeros(const Inputs& inputs, const Outputs& out, int64_t pair, const ValidTokens& valid) {
  if (valid.count() == inputs.length) return;
  const int64_t row = inputs.s.width * out.item;
  for (int64_t i = 0, next = 0; i < inputs.length; ++i) {
    if (next < valid.count() && valid.tokens[next] == i) {
      ++next;
      continue;
    }
    if (out.values) out.values[pair * inputs.length + i] = 0;
    for (char* to : {out.dx, out.dy})
      if (to) std::memset(to + (pair * inputs.length + i) * row, 0, row);
  }
}

// Rows [first, last) of a gradient, from float32 to where they belong.
inline void write_rows(const Inputs& inputs, const float* rows, int64_t stride, const ValidTokens& valid, int64_t pair,
                       int64_t first, int64_t last, char* to, int64_t item) {
  for (int64_t i = first; i < last; ++i) {
    char* row = to + (pair * inputs.length + valid.tokens[i]) * inputs.s.width * item;
    if (item == 2)
      inputs.table.to_bfloat16(rows + (i - first) * stride, inputs.s.width, reinterpret_cast<uint16_t*>(row));
    else
      std::memcpy(row, rows + (i - first) * stride, inputs.s.width * sizeof(float));
  }
}

// All scores of a (sequence, head) of both sides: [blocks of queries][keys][queries of a block].
struct InCache {
  Inputs inputs;
  bool gradient;
  int64_t block, padded, row;
  Workspace workspace;
  float *s, *t, *product;
  char *transposed_x, *transposed_y, *packed;
  std::vector<BlockStats> stats;

  InCache(const Inputs& of, bool gradient)
      : inputs(of),
        gradient(gradient),
        block(of.block),
        padded((of.length + block - 1) / block * block),
        row((of.s.width + 15) / 16 * 16),
        stats(padded / block) {
    workspace.allocate([&](Arena& arena) { lay_out(arena); });
  }

  void lay_out(Arena& arena) {
    inputs.s.lay_out(arena, inputs.length);
    inputs.t.lay_out(arena, inputs.length);
    s = arena.piece<float>(padded * padded);
    t = arena.piece<float>(padded * padded);
    for (BlockStats& of : stats) of.lay_out(arena, block);
    const Gemm& gemm = inputs.s.gemm;
    transposed_x = arena.piece<char>(gradient ? gemm.bytes_b(inputs.s.width, inputs.length) : 0);
    transposed_y =
        arena.piece<char>(gradient && !inputs.s.with_itself ? gemm.bytes_b(inputs.s.width, inputs.length) : 0);
    packed = arena.piece<char>(gradient ? gemm.bytes_a(block, inputs.length) : 0);
    product = arena.piece<float>(gradient ? block * row : 0);
  }

  float* square(float* matrix, int64_t queries, int64_t keys) const {
    return matrix + (queries * padded + keys * block) * block;
  }
  Tile strip(int64_t i, int64_t n) const {
    const int64_t first = i * block, last = first + block < n ? first + block : n;
    const int64_t lanes = (last - first + kQueryLanes - 1) / kQueryLanes * kQueryLanes;
    return {square(s, i, 0), square(t, i, 0), block, inputs.causal ? last : n, lanes};
  }

  void run(int64_t pair, const Outputs& out) {
    const ValidTokens valid = inputs.valid_tokens(pair);
    const int64_t n = valid.count();
    write_zeros(inputs, out, pair, valid);
    if (n == 0) return;
    inputs.s.load_pair(pair / inputs.heads, pair % inputs.heads, valid);
    inputs.t.load_pair(pair / inputs.heads, pair % inputs.heads, valid);
    scores(inputs.s, n, s);
    scores(inputs.t, n, t);
    for (int64_t i = 0; i * block < n; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      const Tile tile = strip(i, n);
      if (inputs.causal)
        inputs.table.mask_future_keys({square(s, i, i), square(t, i, i), block, last - first, last - first});
      inputs.table.statistics(tile, gradient, stats[i].of, stats[i].values);
      stats[i].write(out, pair, inputs.length, valid, first, last);
    }
    if (gradient) backward(pair, valid, out);
  }

  void scores(const QueriesAndKeys& side, int64_t n, float* matrix) const {
    const bool triangle = side.with_itself && !inputs.causal;
    for (int64_t i = 0; i * block < n; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      const int64_t begin = triangle ? first : 0, end = inputs.causal ? last : n;
      side.scores(begin, end, first, last, square(matrix, i, 0) + begin * block, block);
      for (int64_t j = 0; triangle && j < i; ++j)
        inputs.transposes.transpose(square(matrix, j, i), block, block, block, square(matrix, i, j), block);
    }
  }

  void backward(int64_t pair, const ValidTokens& valid, const Outputs& out) {
    const int64_t n = valid.count(), blocks = (n + block - 1) / block;
    inputs.s.pack_transposed(inputs.s.queries, 0, n, transposed_x);
    if (!inputs.s.with_itself) inputs.s.pack_transposed(inputs.s.keys, 0, n, transposed_y);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      stats[i].read_upstream(out, pair, inputs.length, valid, first, last);
      const Tile tile = strip(i, n);
      inputs.table.gradient_from_saved(tile, stats[i].of, stats[i].g);
      if (tile.keys < n)
        std::memset(tile.s + tile.keys * block, 0, (blocks * block - tile.keys) * block * sizeof(float));
      for (int64_t j = 0; inputs.s.with_itself && j <= i; ++j)
        inputs.transposes.symmetrise(square(s, i, j), square(s, j, i), block, block);
    }
    multiply(pair, valid, inputs.s.with_itself ? transposed_x : transposed_y, out.dx, out.item);
    if (inputs.s.with_itself) return;
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t j = 0; j <= i; ++j) inputs.transposes.exchange(square(s, i, j), square(s, j, i), block, block);
    multiply(pair, valid, transposed_x, out.dy, out.item);
  }

  void multiply(int64_t pair, const ValidTokens& valid, const char* transposed, char* to, int64_t item) {
    const Gemm& gemm = inputs.s.gemm;
    const int64_t n = valid.count(), width = inputs.s.width;
    for (int64_t i = 0; i * block < n; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      const bool direct = item == 4 && valid.contiguous;
      gemm.pack_a({square(s, i, 0), kFloat32, 1, block, last - first, n}, packed);
      float* rows = product;
      if (direct) rows = reinterpret_cast<float*>(to) + (pair * inputs.length + valid.tokens[first]) * width;
      gemm.tile(packed, transposed, {last - first, width, n}, {rows, direct ? width : row, inputs.s.scale, false});
      if (!direct) write_rows(inputs, rows, row, valid, pair, first, last, to, item);
    }
  }
};

// f(slice, its number), shared by the threads where there are several.
template <class Slice, class F>
void each_slice(std::vector<Slice>& slices, const F& f) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(slices[k], k);
  };
  slices.size() > 1 ? parallel_for(0, int64_t(slices.size()), 1, some) : some(0, 1);
}

// Adds what of(slice) points to over all slices, in their order; the first one's holds the sum.
template <class Slice, class F>
float* summed(std::vector<Slice>& slices, int64_t count, const F& of) {
  float* sum = of(slices[0]);
  for (size_t k = 1; k < slices.size(); ++k)
    for (int64_t i = 0; i < count; ++i) sum[i] += of(slices[k])[i];
  return sum;
}

// Longer ones: all keys of a block of queries at a time. Threads share the blocks where there are `slices`.
struct PerStrip {
  struct Slice {
    float *s, *t, *dx, *dy;
    char* packed;
    BlockStats stats;
  };

  Inputs inputs;
  bool gradient;
  int64_t block, piece, padded, row;  // piece: keys that are multiplied at a time
  Workspace workspace;
  char *transposed_x, *transposed_y;
  std::vector<Slice> slices;

  PerStrip(const Inputs& of, bool gradient, int64_t count)
      : inputs(of),
        gradient(gradient),
        block(of.block),
        piece(8 * block),
        padded((of.length + piece - 1) / piece * piece),
        row((of.s.width + 15) / 16 * 16),
        slices(count) {
    workspace.allocate([&](Arena& arena) { lay_out(arena); });
  }

  void lay_out(Arena& arena) {
    inputs.s.lay_out(arena, inputs.length);
    inputs.t.lay_out(arena, inputs.length);
    const Gemm& gemm = inputs.s.gemm;
    const int64_t width = inputs.s.width;
    transposed_x = arena.piece<char>(gradient ? padded / block * gemm.bytes_b(width, block) : 0);
    transposed_y = arena.piece<char>(gradient ? padded / piece * gemm.bytes_b(width, piece) : 0);
    for (Slice& slice : slices) {
      slice.s = arena.piece<float>(padded * block);
      slice.t = arena.piece<float>(padded * block);
      slice.stats.lay_out(arena, block);
      slice.packed = arena.piece<char>(gradient ? gemm.bytes_a(piece, piece) : 0);
      slice.dx = arena.piece<float>(gradient ? padded * row : 0);
      slice.dy = inputs.s.with_itself ? slice.dx : arena.piece<float>(gradient ? padded * row : 0);
    }
  }

  void run(int64_t pair, const Outputs& out) {
    const ValidTokens valid = inputs.valid_tokens(pair);
    const int64_t n = valid.count(), count = int64_t(slices.size());
    write_zeros(inputs, out, pair, valid);
    if (n == 0) return;
    inputs.s.load_pair(pair / inputs.heads, pair % inputs.heads, valid);
    inputs.t.load_pair(pair / inputs.heads, pair % inputs.heads, valid);
    if (gradient) pack_transposed(n);
    each_slice(slices, [&](Slice& slice, int64_t k) {
      if (gradient) std::memset(slice.dx, 0, padded * row * sizeof(float));
      if (gradient && !inputs.s.with_itself) std::memset(slice.dy, 0, padded * row * sizeof(float));
      for (int64_t i = k * block; i < n; i += count * block) strip(slice, pair, valid, i, out);
    });
    if (!gradient) return;
    finish(&Slice::dx, pair, valid, out.dx, out.item);
    if (!inputs.s.with_itself) finish(&Slice::dy, pair, valid, out.dy, out.item);
  }

  char* piece_x(int64_t i) const { return transposed_x + i / block * inputs.s.gemm.bytes_b(inputs.s.width, block); }
  char* piece_y(int64_t j) const { return transposed_y + j / piece * inputs.s.gemm.bytes_b(inputs.s.width, piece); }

  void pack_transposed(int64_t n) {
    for (int64_t i = 0; i < n; i += block)
      inputs.s.pack_transposed(inputs.s.queries, i, i + block < n ? i + block : n, piece_x(i));
    for (int64_t j = 0; j < n; j += piece)
      inputs.s.pack_transposed(inputs.s.keys, j, j + piece < n ? j + piece : n, piece_y(j));
  }

  void strip(Slice& slice, int64_t pair, const ValidTokens& valid, int64_t first, const Outputs& out) const {
    const int64_t n = valid.count(), last = first + block < n ? first + block : n, end = inputs.causal ? last : n;
    const int64_t lanes = (last - first + kQueryLanes - 1) / kQueryLanes * kQueryLanes;
    inputs.s.scores(0, end, first, last, slice.s, block);
    inputs.t.scores(0, end, first, last, slice.t, block);
    if (inputs.causal)
      inputs.table.mask_future_keys(
          {slice.s + first * block, slice.t + first * block, block, last - first, last - first});
    const Tile tile = {slice.s, slice.t, block, end, lanes};
    if (!gradient) {
      inputs.table.statistics(tile, false, slice.stats.of, slice.stats.values);
      return slice.stats.write(out, pair, inputs.length, valid, first, last);
    }
    slice.stats.read(out, pair, inputs.length, valid, first, last);
    slice.stats.read_upstream(out, pair, inputs.length, valid, first, last);
    inputs.table.gradient_from_scores(tile, slice.stats.of, slice.stats.g);
    std::memset(slice.s + end * block, 0, (padded - end) * block * sizeof(float));
    for (int64_t j = 0; j < end; j += piece) multiply(slice, n, first, last, j);
  }

  // Adds the gradients of keys [j, j + piece) and queries [first, last) with respect to each other.
  void multiply(Slice& slice, int64_t n, int64_t first, int64_t last, int64_t j) const {
    const Gemm& gemm = inputs.s.gemm;
    const int64_t keys = j + piece < n ? piece : n - j, queries = last - first, width = inputs.s.width;
    const float* weights = slice.s + j * block;
    gemm.pack_a({weights, kFloat32, 1, block, queries, keys}, slice.packed);
    gemm.tile(slice.packed, piece_y(j), {queries, width, keys}, {slice.dx + first * row, row, inputs.s.scale, true});
    gemm.pack_a({weights, kFloat32, block, 1, keys, queries}, slice.packed);
    gemm.tile(slice.packed, piece_x(first), {keys, width, queries}, {slice.dy + j * row, row, inputs.s.scale, true});
  }

  void finish(float* Slice::* part, int64_t pair, const ValidTokens& valid, char* to, int64_t item) {
    const int64_t n = valid.count();
    const float* sum = summed(slices, n * row, [&](Slice& slice) { return slice.*part; });
    write_rows(inputs, sum, row, valid, pair, 0, n, to, item);
  }
};

}  // namespace fastkd::relation
