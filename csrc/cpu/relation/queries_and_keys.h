// One side (student or teacher) of a relation: the queries and keys of one (sequence, head), packed, and tiles of their
// scores.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/relation/op.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/tensors.h"

namespace fastkd::relation {

// x or y [B, H, L, d] as it lies; strides in bytes. An undefined y is x.
struct Heads {
  const char* data;
  int64_t item, of_batch, of_head, of_row, width;

  explicit Heads(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        item(int64_t(x.element_size())),
        of_batch(x.stride(0) * item),
        of_head(x.stride(1) * item),
        of_row(x.stride(2) * item),
        width(x.size(3)) {}
};

// The rows of one (sequence, head) that count, side by side in memory or at least at one distance.
struct Rows {
  const char* data;
  int64_t stride;  // in elements
};

// The tokens of a sequence that count; `run`: one after another, so that nothing need be gathered.
struct ValidTokens {
  std::vector<int64_t> tokens;
  bool contiguous = true;

  int64_t count() const { return int64_t(tokens.size()); }
  int64_t first() const { return tokens.empty() ? 0 : tokens[0]; }

  ValidTokens(const bool* mask, int64_t mask_stride, int64_t length) {
    tokens.reserve(length);
    for (int64_t i = 0; i < length; ++i)
      if (!mask || mask[i * mask_stride]) tokens.push_back(i);
    contiguous = tokens.empty() || tokens.back() - tokens[0] + 1 == count();
  }
};

struct QueriesAndKeys {
  const Gemm& gemm;
  Heads x, y;
  int element;
  bool with_itself, direct, gathers_rows;
  float scale;
  int64_t width;

  // Of the (sequence, head) at hand.
  Rows queries, keys;
  char *gathered_x, *gathered_y, *packed_queries, *packed_keys;

  QueriesAndKeys(const Tensor& x, const Tensor& y, bool with_itself, float scale, bool gathers_rows)
      : gemm(fastkd::gemm(element_of(x))),
        x(x),
        y(y),
        element(element_of(x)),
        with_itself(with_itself),
        direct(gemm.operand == element),
        gathers_rows(gathers_rows),
        scale(scale),
        width(x.size(3)) {}

  void lay_out(Arena& arena, int64_t length) {
    gathered_x = arena.piece<char>(gathers_rows ? length * width * x.item : 0);
    gathered_y = arena.piece<char>(gathers_rows && !with_itself ? length * width * x.item : 0);
    packed_queries = arena.piece<char>(gemm.bytes_b(length, width));
    packed_keys = arena.piece<char>(direct ? 0 : gemm.bytes_a(length, width));
  }

  Rows rows(const Heads& of, int64_t b, int64_t h, const ValidTokens& valid, char* gathered) const {
    const char* from = of.data + b * of.of_batch + h * of.of_head;
    if (valid.contiguous) return {from + valid.first() * of.of_row, of.of_row / of.item};
    for (int64_t i = 0; i < valid.count(); ++i)
      std::memcpy(gathered + i * width * of.item, from + valid.tokens[i] * of.of_row, width * of.item);
    return {gathered, width};
  }

  void load_pair(int64_t b, int64_t h, const ValidTokens& valid) {
    queries = rows(x, b, h, valid, gathered_x);
    keys = with_itself ? queries : rows(y, b, h, valid, gathered_y);
    gemm.pack_b({queries.data, element, queries.stride, 1, valid.count(), width}, packed_queries);
    if (!direct) gemm.pack_a({keys.data, element, keys.stride, 1, valid.count(), width}, packed_keys);
  }

  // Scores of keys [begin, end) (rows) and queries [first, last) (columns, filled up to whole panels).
  void scores(int64_t begin, int64_t end, int64_t first, int64_t last, float* out, int64_t stride) const {
    const int64_t columns = (last - first + gemm.rows_b - 1) / gemm.rows_b * gemm.rows_b;
    const GemmShape shape = {end - begin, columns, width};
    const char* b = packed_queries + gemm.bytes_b(first, width);
    const GemmOut to = {out, stride, scale, false};
    if (direct)
      gemm.tile_direct(keys.data + begin * keys.stride * y.item, keys.stride, b, shape, to);
    else
      gemm.tile(packed_keys + gemm.bytes_a(begin, width), b, shape, to);
  }

  // Rows as the second operand of (weights x rows).
  void pack_transposed(const Rows& from, int64_t begin, int64_t end, char* packed) const {
    gemm.pack_b({from.data + begin * from.stride * x.item, element, 1, from.stride, width, end - begin}, packed);
  }
};

}  // namespace fastkd::relation
