// linear_divergence with the gradient in the forward: it is formed while the logits are there, so that
// nothing is multiplied twice (3 Ds + Dt products of rows x tokens).
//
// All logits of a few rows at a time, in float32: head rows times hidden rows (the head is read where it lies, the few
// hidden rows stay in the cache), transposed on the way. Only their gradient is stored, in the element that the
// products take, for a chunk of rows; then two products finish the chunk, with the tokens as the outer loop.
//
// A chunk's gradient lies where the gradient of the head will be: a tile of tokens has room there for `slot` rows, Ds
// of them if head and operand are of one element, and for `spare` rows in memory of its own, which until then holds the
// logits. A tile is packed before its place is written to. So nothing of the size of a head exists but the head's
// gradient, unless a bfloat16 head meets more rows than one chunk holds: then the sums are float32, in a buffer of
// their own.
#include "cpu/linear_divergence/args.h"
#include "cpu/simd/transpose.h"

namespace fastkd::linear_divergence {
namespace {

constexpr int64_t kLogitBytes = 16 << 20;                // for the logits that exist at once, within
constexpr int64_t kFewestRows = 64, kMostRows = 128;     // rows of them
constexpr int64_t kTile = kDepth;                        // tokens of a tile of the gradient
constexpr int64_t kSpareBytes = 16 << 20;                // for the spare rows, within
constexpr int64_t kFewestSpare = 128, kMostSpare = 256;  // rows
constexpr int64_t kHeadRows = 64;                        // rows of the head's gradient that are in the cache at once

// The valid hidden rows, gathered if they are not contiguous.
struct HiddenRows {
  const HiddenAndHead& side;
  Scratch gathered;

  HiddenRows(const Args& args, const HiddenAndHead& side, int64_t most) : side(side) {
    if (args.has_invalid_rows())
      gathered = Scratch(side.hidden, most * side.width * int64_t(side.hidden.element_size()));
  }
  const char* load_rows(const int64_t* valid_rows, int64_t count) const {
    if (valid_rows[count - 1] - valid_rows[0] == count - 1) return side.row(valid_rows[0]);
    const int64_t bytes = side.width * int64_t(side.hidden.element_size());
    for (int64_t i = 0; i < count; ++i) std::memcpy(gathered.get() + i * bytes, side.row(valid_rows[i]), bytes);
    return gathered.get();
  }
};

// Logits of all tokens for a few rows.
struct SideLogits {
  const HiddenAndHead& side;
  const Table& linear;
  HiddenRows rows;
  Scratch packed;
  bool direct;  // the head as it lies is an operand

  SideLogits(const Args& args, const HiddenAndHead& side, int64_t most)
      : side(side),
        linear(args.linear),
        rows(args, side, most),
        packed(side.hidden, side.gemm->bytes_b(most + side.gemm->rows_b, side.width)),
        direct(element_of(side.head) == side.gemm->operand) {}

  void make(const int64_t* valid_rows, int64_t count, float* out, int64_t stride) const {
    const Gemm& gemm = *side.gemm;
    const TransposeTable& table = chosen_transpose_table();
    const int64_t width = side.width, across = (count + 15) / 16 * 16;
    gemm.pack_b({rows.load_rows(valid_rows, count), element_of(side.hidden), width, 1, count, width}, packed.get());
    const int64_t tile_bytes = kTokens * across * 4;
    parallel_steps(side.vocabulary, kTokens, tile_bytes + (direct ? 0 : kTokens * width * 4),
                   [&](int64_t begin, int64_t end, char* local) {
                     float* tile = reinterpret_cast<float*>(local);
                     const void* head = side.head_row(begin);
                     if (!direct) {  // widened in the cache, which is cheaper than packing it for so few rows
                       linear.scale_row(head, element_of(side.head), 1, local + tile_bytes, kFloat32,
                                        (end - begin) * width);
                       head = local + tile_bytes;
                     }
                     gemm.tile_direct(head, width, packed.get(), {end - begin, count, width}, {tile, across, 1, false});
                     table.transpose(tile, across, end - begin, count, out + begin, stride);
                   });
  }
};

// The gradient of a chunk's logits: [tile of tokens][row][token], the first rows in the place of the head's gradient.
struct LogitGradient {
  int element;
  int64_t item, tokens, slot, spare, tile_bytes;  // tile_bytes: of a token in the head's gradient
  char *place, *beside;

  char* at(int64_t row, int64_t tile) const {
    const int64_t across = std::min(kTile, tokens - tile);
    if (row < slot) return place + tile * tile_bytes + row * across * item;
    return beside + (tile * spare + (row - slot) * across) * item;
  }
  // Some rows, all of them in the head's gradient or all of them spare rows.
  GemmSource rows(int64_t row, int64_t count, int64_t tile, int64_t depth) const {
    return {at(row, tile), element, depth, 1, count, depth};
  }
  GemmSource transposed(int64_t row, int64_t count, int64_t tile, int64_t depth) const {
    return {at(row, tile), element, 1, depth, depth, count};
  }
};

// Logits of both sides for a few rows, in the caller's scratch; the teacher's give way to the gradient.
struct Logits {
  const Args& args;
  const int64_t stride, rows_at_once;  // rows_at_once: rows whose logits exist at once
  SideLogits student;
  std::optional<SideLogits> teacher;

  explicit Logits(const Args& args)
      : args(args),
        stride(Args::stride_of(args.vocabulary)),
        rows_at_once(std::clamp(kLogitBytes / bytes(kFewestRows) * kFewestRows, kFewestRows, kMostRows)),
        student(args, args.student, args.fit(rows_at_once)) {
    if (!args.sparse) teacher.emplace(args, args.teacher, args.fit(rows_at_once));
  }
  int64_t bytes(int64_t rows) const { return 2 * rows * stride * int64_t(sizeof(float)); }

  // f(i, n, s, t) for each of `count` rows, with its logits; n is the row's number among all. Returns where t begins.
  template <class F>
  const float* each_row(const int64_t* valid_rows, int64_t count, float* scratch, const F& f) const {
    float *const s = scratch, *const t = scratch + count * stride;
    student.make(valid_rows, count, s, stride);
    if (teacher) teacher->make(valid_rows, count, t, stride);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        args.finish_logits(args.student, s + i * stride, 0, args.vocabulary);
        if (teacher) args.finish_logits(args.teacher, t + i * stride, 0, args.vocabulary);
        f(i, valid_rows[i], s + i * stride, t + i * stride);
      }
    });
    return t;
  }
};

// Hidden rows [begin, end) as the second operand of gradient^T x rows.
struct TransposedRows {
  const HiddenAndHead& side;
  const int64_t count;
  const Scratch packed;

  TransposedRows(const HiddenAndHead& side, const char* rows, int64_t begin, int64_t end)
      : side(side), count(end - begin), packed(side.hidden, side.gemm->bytes_b(side.width + side.gemm->rows_b, count)) {
    const int64_t item = int64_t(side.hidden.element_size()), width = side.width;
    parallel_steps(count ? width : 0, kWidthBlock, 0, [&](int64_t d, int64_t d_end, char*) {
      side.gemm->pack_b({rows + (begin * width + d) * item, element_of(side.hidden), 1, width, d_end - d, count},
                        packed.get() + side.gemm->bytes_b(d, count));
    });
  }

  void multiply(const char* a, int64_t tokens, float* out, bool accumulate) const {
    if (count) side.gemm->tile(a, packed.get(), {tokens, side.width, count}, {out, side.width, 1, accumulate});
  }
};

struct GradientInForward {
  const Args& args;
  const float* const weight;
  const bool to_hidden, to_head, to_bias;
  const bool narrow;  // the head's gradient is bfloat16
  const int64_t count;
  Tensor values, hidden, head, bias;
  const Logits logits;
  LogitGradient gradient = {};
  Scratch scratch;  // the spare rows, then room for the logits of `few`; before that, of `logits.rows_at_once` rows
  int64_t few;      // rows whose logits exist beside the spare rows
  int64_t spare_bytes = 0;
  Scratch sums;  // float32, of a narrow gradient in several chunks

  GradientInForward(const Args& args, const float* weight, bool to_hidden, bool to_head, bool to_bias)
      : args(args),
        weight(weight),
        to_hidden(to_hidden),
        to_head(to_head),
        to_bias(to_bias),
        narrow(element_of(args.student.head) == kBFloat16),
        count(args.valid_rows.size()),
        logits(args),
        few(to_head && narrow ? logits.rows_at_once / 2 : logits.rows_at_once) {
    const Tensor& like = args.student.hidden;
    const ScalarType type = narrow ? ScalarType::BFloat16 : ScalarType::Float;
    values = zeros(like, args.rows, 1);
    hidden = count == args.rows ? large(like, to_hidden ? args.rows : 0, args.width)
                                : zeros(like, to_hidden ? args.rows : 0, args.width);
    bias = zeros(like, to_bias ? args.vocabulary : 0, 1);
    head = count ? large(like, to_head ? args.vocabulary : 0, args.width, type)
                 : zeros(like, to_head ? args.vocabulary : 0, args.width, type);
    if (multiplies()) place();
    const int64_t beside = spare_bytes ? spare_bytes + logits.bytes(args.fit(few)) : 0;
    scratch = Scratch(like, std::max(beside, logits.bytes(args.fit(logits.rows_at_once))));
    gradient.beside = scratch.get();
  }
  bool multiplies() const { return count && (to_hidden || to_head); }

  void place() {
    const Tensor& like = args.student.hidden;
    const int element = args.student.gemm->operand;
    const int64_t item = element == kBFloat16 ? 2 : 4, bytes = args.width * (narrow ? 2 : 4);
    const int64_t slot = to_head ? bytes / item : 0;
    int64_t spare = std::clamp(kSpareBytes / (args.vocabulary * item), kFewestSpare, kMostSpare);
    spare = std::clamp<int64_t>(count - slot, 0, spare);
    gradient = {element,
                item,
                args.vocabulary,
                slot,
                spare,
                bytes,
                to_head ? static_cast<char*>(head.mutable_data_ptr()) : nullptr,
                nullptr};
    spare_bytes = (spare * args.vocabulary * item + 63) / 64 * 64;
    if (narrow && to_head && count > slot + spare) sums = Scratch(like, args.vocabulary * args.width * 4);
  }

  void run() {
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = multiplies() ? std::min(count, begin + gradient.slot + gradient.spare) : count;
      const int64_t there = multiplies() ? std::min(end - begin, gradient.slot) : end - begin;
      for_steps(there, logits.rows_at_once,
                [&](int64_t i, int64_t i_end) { differentiate(begin, i, i_end, scratch.get()); });
      for_steps(end - begin - there, few, [&](int64_t i, int64_t i_end) {
        differentiate(begin, there + i, there + i_end, scratch.get() + spare_bytes);
      });
      if (multiplies()) multiply(begin, end);
      if (!narrow) gradient.slot = 0;  // the sums are there now
    }
  }

  // Values and gradient of rows [i, i_end) of the chunk that begins at row `begin` of those that count.
  void differentiate(int64_t begin, int64_t i, int64_t i_end, char* place) {
    float *value = values.mutable_data_ptr<float>(), *at = reinterpret_cast<float*>(place);
    const bool wanted = to_hidden || to_head || to_bias;
    const int64_t* valid_rows = args.valid_rows.data() + begin + i;
    const float* made = logits.each_row(valid_rows, i_end - i, at, [&](int64_t r, int64_t n, const float* s, float* t) {
      RowStats stats;
      value[n] = args.forward_row(n, s, t, &stats);
      if (!wanted) return;
      args.differentiate(n, 0, args.vocabulary, s, t, stats, weight[n]);
      for_steps(multiplies() ? args.vocabulary : 0, kTile, [&](int64_t v, int64_t v_end) {
        args.linear.scale_row(t + v, kFloat32, 1, gradient.at(i + r, v), gradient.element, v_end - v);
      });
    });
    if (!to_bias) return;
    float* out = bias.mutable_data_ptr<float>();
    parallel_steps(args.vocabulary, kTokens, 0, [&](int64_t v, int64_t v_end, char*) {
      for (int64_t r = 0; r < i_end - i; ++r) args.linear.add_row(out + v, made + r * logits.stride + v, v_end - v);
    });
  }

  void multiply(int64_t begin, int64_t end) {
    const int64_t rows = end - begin, there = std::min(rows, gradient.slot);  // rows in the head's place
    const int64_t* valid_rows = args.valid_rows.data() + begin;
    if (to_hidden) hidden_gradient(valid_rows, rows, there);
    if (to_head) head_gradient(valid_rows, rows, there, begin > 0, end == count);
  }

  void hidden_gradient(const int64_t* valid_rows, int64_t rows, int64_t there) {
    const HiddenProduct product(args.student);
    const int64_t width = args.width;
    const bool contiguous = valid_rows[rows - 1] - valid_rows[0] == rows - 1;
    const Scratch gathered_sums(args.student.hidden, contiguous ? 0 : rows * width * 4);
    float* out = hidden.mutable_data_ptr<float>();
    float* of_rows = contiguous ? out + valid_rows[0] * width : gathered_sums.floats();
    const auto some = [&](int64_t first, int64_t last, int64_t v, int64_t v_end) {
      const auto source = [&](int64_t row, int64_t rows, int64_t token, int64_t tokens) {
        return gradient.rows(first + row, rows, token, tokens);
      };
      product.multiply(last - first, v, v_end, source, of_rows + first * width, v > 0);
    };
    HiddenProduct::each(0, args.vocabulary, [&](int64_t v, int64_t v_end) {
      product.pack_transposed(v, v_end);
      some(0, there, v, v_end);
      some(there, rows, v, v_end);
    });
    for (int64_t i = 0; i < rows && !contiguous; ++i)
      std::memcpy(out + valid_rows[i] * width, of_rows + i * width, width * 4);
  }

  void head_gradient(const int64_t* valid_rows, int64_t rows, int64_t there, bool accumulate, bool last) {
    const HiddenRows hidden_rows(args, args.student, rows);
    const char* x = hidden_rows.load_rows(valid_rows, rows);
    const TransposedRows first(args.student, x, 0, there), second(args.student, x, there, rows);
    const Gemm& gemm = *args.student.gemm;
    const int64_t width = args.width, bytes_first = gemm.bytes_a(kTile + gemm.rows_a, there);
    const int64_t bytes_packed = bytes_first + gemm.bytes_a(kTile + gemm.rows_a, rows - there);
    float* to = narrow ? (sums.tensor.defined() ? sums.floats() : nullptr) : head.mutable_data_ptr<float>();
    parallel_steps(
        args.vocabulary, kTile, bytes_packed + (to ? 0 : kHeadRows * width * 4),
        [&](int64_t v, int64_t v_end, char* a) {
          gemm.pack_a(gradient.transposed(0, there, v, v_end - v), a);
          gemm.pack_a(gradient.transposed(there, rows - there, v, v_end - v), a + bytes_first);
          for_steps(v_end - v, kHeadRows, [&](int64_t w, int64_t w_end) {
            float* out = to ? to + (v + w) * width : reinterpret_cast<float*>(a + bytes_packed);
            first.multiply(a + gemm.bytes_a(w, there), w_end - w, out, accumulate);
            second.multiply(a + bytes_first + gemm.bytes_a(w, rows - there), w_end - w, out, accumulate || there > 0);
            if (narrow && last)
              args.linear.scale_row(out, kFloat32, 1, static_cast<char*>(head.mutable_data_ptr()) + (v + w) * width * 2,
                                    kBFloat16, (w_end - w) * width);
          });
        });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_divergence_fwd_grad(const Tensor& weights, FASTKD_LINEAR_PARAMETERS,
                                                                      bool to_hidden, bool to_head, bool to_bias) {
  const Check check("linear_divergence_fwd_grad");
  FASTKD_LINEAR_CHECK(check);
  check("weights", weights, kF32, "[N]", {hidden.size(0)});
  const Args args = FASTKD_LINEAR_ARGS;
  const Tensor w = torch::stable::contiguous(weights);
  GradientInForward pass(args, w.const_data_ptr<float>(), to_hidden, to_head, to_bias);
  pass.run();
  return {pass.values, pass.hidden, pass.head, pass.bias};
}

}  // namespace
}  // namespace fastkd::linear_divergence

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("linear_divergence_fwd_grad", TORCH_BOX(&fastkd::linear_divergence::linear_divergence_fwd_grad));
}
