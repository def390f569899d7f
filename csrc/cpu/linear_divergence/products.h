// The four products of linear_divergence on a block of rows x tokens. Every number is computed by one thread: nothing
// is reduced between threads, and the results do not depend on how many there are.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/linear_divergence/op.h"
#include "cpu/runtime/scratch.h"

namespace fastkd::linear_divergence {
namespace {

constexpr int64_t kTokens = 128;     // of a tile: as packed, they and their logits stay in L2
constexpr int64_t kRows = 64;        // rows that are packed, or multiplied, together
constexpr int64_t kDepth = 512;      // tokens in one piece of the transposed head
constexpr int64_t kStrip = 32;       // tokens that are transposed together: a whole block of every panel's layout
constexpr int64_t kPieces = 3;       // pieces of the transposed head that exist at a time
constexpr int64_t kWidthBlock = 96;  // width of the transposed operands that one thread packs at a time

// f(begin, end) on `step` of `count` at a time.
template <class F>
void for_steps(int64_t count, int64_t step, const F& f) {
  for (int64_t begin = 0; begin < count; begin += step) f(begin, std::min(count, begin + step));
}

// f(begin, end, scratch) on `step` of `count` at a time, over the threads; each has `bytes` of scratch.
template <class F>
void parallel_steps(int64_t count, int64_t step, int64_t bytes, const F& f) {
  parallel_for(0, (count + step - 1) / step, 1, [&](int64_t first, int64_t last) {
    const Workspace local(bytes);
    for (int64_t i = first; i < last; ++i) f(i * step, std::min(count, (i + 1) * step), local.get());
  });
}

// hidden [N, D] and head [V, D] of one model, bias [V] and what shapes its logits.
struct HiddenAndHead {
  Tensor hidden, head, bias;
  const Gemm* gemm = nullptr;
  int64_t width = 0, vocabulary = 0;
  float scale = 1, cap = 0;

  HiddenAndHead() = default;
  HiddenAndHead(const Tensor& states, const Tensor& weights, const std::optional<Tensor>& offset, double scale,
                double cap)
      : hidden(torch::stable::contiguous(states)),
        head(torch::stable::contiguous(weights)),
        gemm(&fastkd::gemm(kBFloat16, element_of(states) != kBFloat16 || element_of(weights) != kBFloat16)),
        width(states.size(1)),
        vocabulary(weights.size(0)),
        scale(float(scale)),
        cap(float(cap)) {
    if (offset) bias = torch::stable::contiguous(*offset);
    has_bias = offset.has_value();
  }
  bool has_bias = false;
  const float* bias_from(int64_t token) const { return has_bias ? bias.const_data_ptr<float>() + token : nullptr; }
  bool changes_logits() const { return scale != 1 || cap != 0; }
  const char* row(int64_t i) const { return at(hidden, i); }
  const char* head_row(int64_t v) const { return at(head, v); }

 private:
  const char* at(const Tensor& x, int64_t i) const {
    return static_cast<const char*>(x.const_data_ptr()) + i * width * int64_t(x.element_size());
  }
};

// Some rows of a side, packed; rows that are not contiguous are gathered first.
struct PackedRows {
  const HiddenAndHead& side;
  Scratch packed, gathered, transposed;
  const char* rows = nullptr;
  int64_t count = 0;

  PackedRows(const HiddenAndHead& side, int64_t most, bool has_invalid_rows, bool transposes) : side(side) {
    const Gemm& gemm = *side.gemm;
    packed = Scratch(side.hidden, gemm.bytes_a(most + gemm.rows_a, side.width));
    if (has_invalid_rows) gathered = Scratch(side.hidden, most * side.width * int64_t(side.hidden.element_size()));
    if (transposes) transposed = Scratch(side.hidden, gemm.bytes_b(side.width + gemm.rows_b, most));
  }

  void load_rows(const int64_t* valid_rows, int64_t number) {
    count = number;
    const int64_t item = int64_t(side.hidden.element_size()), bytes = side.width * item;
    const bool lie_together = valid_rows[number - 1] - valid_rows[0] == number - 1;
    rows = lie_together ? side.row(valid_rows[0]) : gathered.get();
    parallel_steps(number, kRows, 0, [&](int64_t begin, int64_t end, char*) {
      for (int64_t i = begin; i < end && !lie_together; ++i)
        std::memcpy(gathered.get() + i * bytes, side.row(valid_rows[i]), bytes);
      side.gemm->pack_a({rows + begin * bytes, element_of(side.hidden), side.width, 1, end - begin, side.width},
                        packed.get() + side.gemm->bytes_a(begin, side.width));
    });
  }

  // The rows as the second operand of gradient^T x rows.
  void pack_transposed() const {
    const int64_t item = int64_t(side.hidden.element_size());
    parallel_steps(side.width, kWidthBlock, 0, [&](int64_t begin, int64_t end, char*) {
      side.gemm->pack_b({rows + begin * item, element_of(side.hidden), 1, side.width, end - begin, count},
                        transposed.get() + side.gemm->bytes_b(begin, count));
    });
  }

  // out [count][stride]: logits of tokens [v, v_end), without bias.
  void logits(int64_t v, int64_t v_end, float* out, int64_t stride) const {
    const Gemm& gemm = *side.gemm;
    parallel_steps(
        v_end - v, kTokens, gemm.bytes_b(kTokens + gemm.rows_b, side.width), [&](int64_t begin, int64_t end, char* b) {
          gemm.pack_b({side.head_row(v + begin), element_of(side.head), side.width, 1, end - begin, side.width}, b);
          gemm.tile(packed.get(), b, {count, end - begin, side.width}, {out + begin, stride, 1, false});
        });
  }
};

// gradient [count][stride] of the logits of tokens [v, v_end) -> head [v_end - v, D] (+)= gradient^T rows, and the
// bias.
inline void head_gradient(const Table& table, const PackedRows& rows, const float* gradient, int64_t stride,
                          int64_t tokens, float* head, float* bias, bool accumulate) {
  const Gemm& gemm = *rows.side.gemm;
  const int64_t width = rows.side.width, count = rows.count;
  if (head) rows.pack_transposed();
  parallel_steps(
      tokens, kTokens, head ? gemm.bytes_a(kTokens + gemm.rows_a, count) : 0, [&](int64_t begin, int64_t end, char* a) {
        if (bias && !accumulate) std::memset(bias + begin, 0, (end - begin) * sizeof(float));
        for (int64_t i = 0; i < count && bias; ++i)
          table.add_row(bias + begin, gradient + i * stride + begin, end - begin);
        if (!head) return;
        gemm.pack_a({gradient + begin, kFloat32, 1, stride, end - begin, count}, a);
        gemm.tile(a, rows.transposed.get(), {end - begin, width, count}, {head + begin * width, width, 1, accumulate});
      });
}

// hidden [rows, D] (+)= gradient x head, a few pieces of tokens at a time: pack_transposed() packs the head of these
// tokens, multiply() multiplies the gradient of some rows with it.
struct HiddenProduct {
  const HiddenAndHead& side;
  Scratch transposed;

  explicit HiddenProduct(const HiddenAndHead& side)
      : side(side), transposed(side.hidden, kPieces * side.gemm->bytes_b(side.width + side.gemm->rows_b, kDepth)) {}

  // f(begin, end): the tokens of one pack_transposed() and the multiply() that follow it.
  template <class F>
  static void each(int64_t v, int64_t v_end, const F& f) {
    for (int64_t w = v; w < v_end; w += kPieces * kDepth) f(w, std::min(v_end, w + kPieces * kDepth));
  }

  void pack_transposed(int64_t v, int64_t v_end) const {
    parallel_steps(v_end - v, kStrip, 0, [&](int64_t begin, int64_t end, char*) {
      pack_transposed_strip(v + begin, end - begin, begin, v_end - v);
    });
  }

  // source(row, rows, token, tokens) says where this part of the gradient lies; it is packed unless it can be an
  // operand as it lies.
  template <class F>
  void multiply(int64_t rows, int64_t v, int64_t v_end, const F& source, float* hidden, bool accumulate) const {
    const Gemm& gemm = *side.gemm;
    const int64_t width = side.width;
    parallel_steps(rows, kRows, gemm.bytes_a(kRows + gemm.rows_a, kDepth), [&](int64_t begin, int64_t end, char* a) {
      for (int64_t w = 0; w < v_end - v; w += kDepth) {
        const int64_t depth = std::min(kDepth, v_end - v - w);
        const GemmSource from = source(begin, end - begin, v + w, depth);
        const GemmOut out = {hidden + begin * width, width, 1, accumulate || w > 0};
        if (from.element == gemm.operand && from.k_stride == 1) {
          gemm.tile_direct(from.data, from.row_stride, piece(w), {end - begin, width, depth}, out);
        } else {
          gemm.pack_a(from, a);
          gemm.tile(a, piece(w), {end - begin, width, depth}, out);
        }
      }
    });
  }

 private:
  char* piece(int64_t token) const { return transposed.get() + token / kDepth * piece_bytes(); }
  int64_t piece_bytes() const { return side.gemm->bytes_b(side.width + side.gemm->rows_b, kDepth); }

  // A few tokens, over their whole width before the next ones: the head is read in the order in which it lies. Within a
  // panel k goes on from strip to strip.
  void pack_transposed_strip(int64_t token, int64_t tokens, int64_t begin, int64_t end) const {
    const Gemm& gemm = *side.gemm;
    const int64_t item = int64_t(side.head.element_size()), from = begin % kDepth;
    const int64_t depth = std::min(kDepth, end - (begin - from));
    for (int64_t d = 0; d < side.width; d += gemm.rows_b) {
      const int64_t columns = std::min<int64_t>(gemm.rows_b, side.width - d);
      gemm.pack_b({side.head_row(token) + d * item, element_of(side.head), 1, side.width, columns, tokens},
                  piece(begin) + gemm.bytes_b(d, depth) + gemm.bytes_b(gemm.rows_b, from));
    }
  }
};

}  // namespace
}  // namespace fastkd::linear_divergence
