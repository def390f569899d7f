// What is done for one (sequence, head) of a relation: all at once where its scores fit in scratch, or a block of
// queries at a time. The mathematics is in relation/op.cpp.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/relation/side.h"
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
  const TurnTable& turn;
  QueriesAndKeys s, t;
  const bool* mask;
  int64_t mask_batch, mask_token;
  bool causal;
  int64_t heads, length, block;  // block: queries at a time, a multiple of every panel

  ValidTokens kept(int64_t pair) const {
    return {mask ? mask + pair / heads * mask_batch : nullptr, mask_token, length};
  }
};

// The statistics of a block of queries.
struct BlockStats {
  Stats of;
  float *values, *g;

  void carve(Arena& arena, int64_t block) {
    of = {arena.take<float>(block), arena.take<float>(block), arena.take<float>(block), arena.take<float>(block)};
    values = arena.take<float>(block);
    g = arena.take<float>(block);
  }

  float* part(int k) const { return k == 0 ? of.max_t : k == 1 ? of.sum_t : k == 2 ? of.max_s : of.excess; }

  // Queries [first, last) of a (sequence, head).
  void write(const Outputs& out, int64_t pair, int64_t length, const ValidTokens& kept, int64_t first,
             int64_t last) const {
    for (int64_t i = first; i < last; ++i) {
      if (out.values) out.values[pair * length + kept.tokens[i]] = values[i - first];
      if (out.stats)
        for (int k = 0; k < 4; ++k) out.stats[(pair * 4 + k) * length + kept.tokens[i]] = part(k)[i - first];
    }
  }
  void read(const Outputs& out, int64_t pair, int64_t length, const ValidTokens& kept, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int k = 0; k < 4; ++k) part(k)[i - first] = out.stats[(pair * 4 + k) * length + kept.tokens[i]];
  }
  void read_upstream(const Outputs& out, int64_t pair, int64_t length, const ValidTokens& kept, int64_t first,
                     int64_t last) {
    for (int64_t i = first; i < last; ++i)
      g[i - first] = out.upstream ? out.upstream[pair * length + kept.tokens[i]] : 1;
  }
};

// What is masked: value 0, gradient 0.
inline void write_zeros(const Inputs& call, const Outputs& out, int64_t pair, const ValidTokens& kept) {
  if (kept.count() == call.length) return;
  const int64_t row = call.s.width * out.item;
  for (int64_t i = 0, next = 0; i < call.length; ++i) {
    if (next < kept.count() && kept.tokens[next] == i) {
      ++next;
      continue;
    }
    if (out.values) out.values[pair * call.length + i] = 0;
    for (char* to : {out.dx, out.dy})
      if (to) std::memset(to + (pair * call.length + i) * row, 0, row);
  }
}

// Rows [first, last) of a gradient, from float32 to where they belong.
inline void write_rows(const Inputs& call, const float* rows, int64_t stride, const ValidTokens& kept, int64_t pair,
                       int64_t first, int64_t last, char* to, int64_t item) {
  for (int64_t i = first; i < last; ++i) {
    char* row = to + (pair * call.length + kept.tokens[i]) * call.s.width * item;
    if (item == 2)
      call.table.narrow(rows + (i - first) * stride, call.s.width, reinterpret_cast<uint16_t*>(row));
    else
      std::memcpy(row, rows + (i - first) * stride, call.s.width * sizeof(float));
  }
}

// All scores of a (sequence, head) of both sides: [blocks of queries][keys][queries of a block].
struct RelationWhole {
  Inputs call;
  bool gradient;
  int64_t block, padded, row;
  Memory memory;
  float *s, *t, *pulled;
  char *turned_x, *turned_y, *packed;
  std::vector<BlockStats> stats;

  RelationWhole(const Inputs& of, bool gradient)
      : call(of),
        gradient(gradient),
        block(of.block),
        padded((of.length + block - 1) / block * block),
        row((of.s.width + 15) / 16 * 16),
        stats(padded / block) {
    memory.fill([&](Arena& arena) { carve(arena); });
  }

  void carve(Arena& arena) {
    call.s.carve(arena, call.length);
    call.t.carve(arena, call.length);
    s = arena.take<float>(padded * padded);
    t = arena.take<float>(padded * padded);
    for (BlockStats& of : stats) of.carve(arena, block);
    const Gemm& gemm = call.s.gemm;
    turned_x = arena.take<char>(gradient ? gemm.bytes_b(call.s.width, call.length) : 0);
    turned_y = arena.take<char>(gradient && !call.s.self ? gemm.bytes_b(call.s.width, call.length) : 0);
    packed = arena.take<char>(gradient ? gemm.bytes_a(block, call.length) : 0);
    pulled = arena.take<float>(gradient ? block * row : 0);
  }

  float* square(float* matrix, int64_t queries, int64_t keys) const {
    return matrix + (queries * padded + keys * block) * block;
  }
  Tile strip(int64_t i, int64_t n) const {
    const int64_t first = i * block, last = first + block < n ? first + block : n;
    const int64_t lanes = (last - first + kRelationLanes - 1) / kRelationLanes * kRelationLanes;
    return {square(s, i, 0), square(t, i, 0), block, call.causal ? last : n, lanes};
  }

  void run(int64_t pair, const Outputs& out) {
    const ValidTokens kept = call.kept(pair);
    const int64_t n = kept.count();
    write_zeros(call, out, pair, kept);
    if (n == 0) return;
    call.s.take(pair / call.heads, pair % call.heads, kept);
    call.t.take(pair / call.heads, pair % call.heads, kept);
    scores(call.s, n, s);
    scores(call.t, n, t);
    for (int64_t i = 0; i * block < n; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      const Tile tile = strip(i, n);
      if (call.causal) call.table.hide({square(s, i, i), square(t, i, i), block, last - first, last - first});
      call.table.statistics(tile, gradient, stats[i].of, stats[i].values);
      stats[i].write(out, pair, call.length, kept, first, last);
    }
    if (gradient) pull(pair, kept, out);
  }

  void scores(const QueriesAndKeys& side, int64_t n, float* matrix) const {
    const bool triangle = side.self && !call.causal;
    for (int64_t i = 0; i * block < n; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      const int64_t begin = triangle ? first : 0, end = call.causal ? last : n;
      side.scores(begin, end, first, last, square(matrix, i, 0) + begin * block, block);
      for (int64_t j = 0; triangle && j < i; ++j)
        call.turn.copy(square(matrix, j, i), square(matrix, i, j), block, block);
    }
  }

  void pull(int64_t pair, const ValidTokens& kept, const Outputs& out) {
    const int64_t n = kept.count(), blocks = (n + block - 1) / block;
    call.s.turn(call.s.queries, 0, n, turned_x);
    if (!call.s.self) call.s.turn(call.s.keys, 0, n, turned_y);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      stats[i].read_upstream(out, pair, call.length, kept, first, last);
      const Tile tile = strip(i, n);
      call.table.from_kept(tile, stats[i].of, stats[i].g);
      if (tile.keys < n)
        std::memset(tile.s + tile.keys * block, 0, (blocks * block - tile.keys) * block * sizeof(float));
      for (int64_t j = 0; call.s.self && j <= i; ++j)
        call.turn.symmetrise(square(s, i, j), square(s, j, i), block, block);
    }
    multiply(pair, kept, call.s.self ? turned_x : turned_y, out.dx, out.item);
    if (call.s.self) return;
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t j = 0; j <= i; ++j) call.turn.exchange(square(s, i, j), square(s, j, i), block, block);
    multiply(pair, kept, turned_x, out.dy, out.item);
  }

  void multiply(int64_t pair, const ValidTokens& kept, const char* turned, char* to, int64_t item) {
    const Gemm& gemm = call.s.gemm;
    const int64_t n = kept.count(), width = call.s.width;
    for (int64_t i = 0; i * block < n; ++i) {
      const int64_t first = i * block, last = first + block < n ? first + block : n;
      const bool direct = item == 4 && kept.run;
      gemm.pack_a({square(s, i, 0), kFloat32, 1, block, last - first, n}, packed);
      float* rows = pulled;
      if (direct) rows = reinterpret_cast<float*>(to) + (pair * call.length + kept.tokens[first]) * width;
      gemm.tile(packed, turned, {last - first, width, n}, {rows, direct ? width : row, call.s.scale, false});
      if (!direct) write_rows(call, rows, row, kept, pair, first, last, to, item);
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
struct RelationLong {
  struct Slice {
    float *s, *t, *dx, *dy;
    char* packed;
    BlockStats stats;
  };

  Inputs call;
  bool gradient;
  int64_t block, piece, padded, row;  // piece: keys that are multiplied at a time
  Memory memory;
  char *turned_x, *turned_y;
  std::vector<Slice> slices;

  RelationLong(const Inputs& of, bool gradient, int64_t count)
      : call(of),
        gradient(gradient),
        block(of.block),
        piece(8 * block),
        padded((of.length + piece - 1) / piece * piece),
        row((of.s.width + 15) / 16 * 16),
        slices(count) {
    memory.fill([&](Arena& arena) { carve(arena); });
  }

  void carve(Arena& arena) {
    call.s.carve(arena, call.length);
    call.t.carve(arena, call.length);
    const Gemm& gemm = call.s.gemm;
    const int64_t width = call.s.width;
    turned_x = arena.take<char>(gradient ? padded / block * gemm.bytes_b(width, block) : 0);
    turned_y = arena.take<char>(gradient ? padded / piece * gemm.bytes_b(width, piece) : 0);
    for (Slice& slice : slices) {
      slice.s = arena.take<float>(padded * block);
      slice.t = arena.take<float>(padded * block);
      slice.stats.carve(arena, block);
      slice.packed = arena.take<char>(gradient ? gemm.bytes_a(piece, piece) : 0);
      slice.dx = arena.take<float>(gradient ? padded * row : 0);
      slice.dy = call.s.self ? slice.dx : arena.take<float>(gradient ? padded * row : 0);
    }
  }

  void run(int64_t pair, const Outputs& out) {
    const ValidTokens kept = call.kept(pair);
    const int64_t n = kept.count(), count = int64_t(slices.size());
    write_zeros(call, out, pair, kept);
    if (n == 0) return;
    call.s.take(pair / call.heads, pair % call.heads, kept);
    call.t.take(pair / call.heads, pair % call.heads, kept);
    if (gradient) turn(n);
    each_slice(slices, [&](Slice& slice, int64_t k) {
      if (gradient) std::memset(slice.dx, 0, padded * row * sizeof(float));
      if (gradient && !call.s.self) std::memset(slice.dy, 0, padded * row * sizeof(float));
      for (int64_t i = k * block; i < n; i += count * block) strip(slice, pair, kept, i, out);
    });
    if (!gradient) return;
    finish(&Slice::dx, pair, kept, out.dx, out.item);
    if (!call.s.self) finish(&Slice::dy, pair, kept, out.dy, out.item);
  }

  char* piece_x(int64_t i) const { return turned_x + i / block * call.s.gemm.bytes_b(call.s.width, block); }
  char* piece_y(int64_t j) const { return turned_y + j / piece * call.s.gemm.bytes_b(call.s.width, piece); }

  void turn(int64_t n) {
    for (int64_t i = 0; i < n; i += block) call.s.turn(call.s.queries, i, i + block < n ? i + block : n, piece_x(i));
    for (int64_t j = 0; j < n; j += piece) call.s.turn(call.s.keys, j, j + piece < n ? j + piece : n, piece_y(j));
  }

  void strip(Slice& slice, int64_t pair, const ValidTokens& kept, int64_t first, const Outputs& out) const {
    const int64_t n = kept.count(), last = first + block < n ? first + block : n, end = call.causal ? last : n;
    const int64_t lanes = (last - first + kRelationLanes - 1) / kRelationLanes * kRelationLanes;
    call.s.scores(0, end, first, last, slice.s, block);
    call.t.scores(0, end, first, last, slice.t, block);
    if (call.causal)
      call.table.hide({slice.s + first * block, slice.t + first * block, block, last - first, last - first});
    const Tile tile = {slice.s, slice.t, block, end, lanes};
    if (!gradient) {
      call.table.statistics(tile, false, slice.stats.of, slice.stats.values);
      return slice.stats.write(out, pair, call.length, kept, first, last);
    }
    slice.stats.read(out, pair, call.length, kept, first, last);
    slice.stats.read_upstream(out, pair, call.length, kept, first, last);
    call.table.from_scores(tile, slice.stats.of, slice.stats.g);
    std::memset(slice.s + end * block, 0, (padded - end) * block * sizeof(float));
    for (int64_t j = 0; j < end; j += piece) multiply(slice, n, first, last, j);
  }

  // Keys [j, j + piece) and queries [first, last): what each pulls the others to.
  void multiply(Slice& slice, int64_t n, int64_t first, int64_t last, int64_t j) const {
    const Gemm& gemm = call.s.gemm;
    const int64_t keys = j + piece < n ? piece : n - j, queries = last - first, width = call.s.width;
    const float* weights = slice.s + j * block;
    gemm.pack_a({weights, kFloat32, 1, block, queries, keys}, slice.packed);
    gemm.tile(slice.packed, piece_y(j), {queries, width, keys}, {slice.dx + first * row, row, call.s.scale, true});
    gemm.pack_a({weights, kFloat32, block, 1, keys, queries}, slice.packed);
    gemm.tile(slice.packed, piece_x(first), {keys, width, queries}, {slice.dy + j * row, row, call.s.scale, true});
  }

  void finish(float* Slice::* part, int64_t pair, const ValidTokens& kept, char* to, int64_t item) {
    const int64_t n = kept.count();
    const float* sum = summed(slices, n * row, [&](Slice& slice) { return slice.*part; });
    write_rows(call, sum, row, kept, pair, 0, n, to, item);
  }
};

}  // namespace fastkd::relation
