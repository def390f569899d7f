// linear_divergence with the logits recomputed: blocks of kBlockRows rows and kBlockTokens tokens; logits exist for one
// block only.
//
// linear_divergence_fwd    carries the sums of each row from block to block; saves eight numbers per row.
// linear_divergence_bwd    computes the logits of the same blocks again (another Ds + Dt), with the tokens as the outer
// loop.
//
// Rows that do not count are left out before anything is multiplied. A sparse teacher has no head, and needs whole
// rows. With the gradient in the forward: linear_divergence/gradient_in_forward.cpp.
#include "cpu/linear_divergence/args.h"

namespace fastkd::linear_divergence {
namespace {

constexpr int64_t kSparseRows = 128, kBlockRows = 1024, kBlockTokens = 3 * kDepth;

int64_t tokens_per_block(const Args& args) {
  return args.sparse ? args.vocabulary : std::min(args.vocabulary, kBlockTokens);
}
int64_t rows_per_block(const Args& args) { return args.sparse ? kSparseRows : kBlockRows; }

// Logits of both sides for some rows and tokens; the gradient is written over the teacher's.
struct Block {
  const Args& args;
  PackedRows student;
  std::optional<PackedRows> teacher;
  Scratch scratch;
  int64_t stride;
  float *s, *t;
  const int64_t* valid_rows = nullptr;
  int64_t count = 0, first = 0, tokens = 0;

  Block(const Args& args, int64_t most_rows, int64_t most_tokens, bool transposes)
      : args(args),
        student(args.student, args.fit(most_rows), args.has_invalid_rows(), transposes),
        stride(Args::stride_of(most_tokens)) {
    if (!args.sparse) teacher.emplace(args.teacher, args.fit(most_rows), args.has_invalid_rows(), false);
    const int64_t size = args.fit(most_rows) * stride;
    scratch = Scratch(args.student.hidden, 2 * size * 4);
    s = scratch.floats(), t = s + size;
  }

  void load_rows(int64_t begin, int64_t end) {
    if (valid_rows == args.valid_rows.data() + begin && count == end - begin) return;
    valid_rows = args.valid_rows.data() + begin, count = end - begin;
    student.load_rows(valid_rows, count);
    if (teacher) teacher->load_rows(valid_rows, count);
  }

  void make(int64_t begin, int64_t end) {
    first = begin, tokens = end - begin;
    student.logits(begin, end, s, stride);
    if (teacher) teacher->logits(begin, end, t, stride);
  }

  // f(i, n, s, t) for each row, with its logits; n is the row's number among all.
  template <class F>
  void each_row(const F& f) const {
    parallel_for(0, count, grain(tokens), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        args.finish_logits(args.student, s + i * stride, first, tokens);
        if (teacher) args.finish_logits(args.teacher, t + i * stride, first, tokens);
        f(i, valid_rows[i], s + i * stride, t + i * stride);
      }
    });
  }
};

// The gradients, in float32; those that are not requested have no rows.
struct Gradients {
  Tensor hidden, head, bias;
  float *of_head, *of_bias;

  Gradients(const Args& args, bool to_hidden, bool to_head, bool to_bias) {
    const Tensor& like = args.student.hidden;
    const bool none = args.valid_rows.empty();
    hidden = zeros(like, to_hidden ? args.rows : 0, args.width);
    head = none ? zeros(like, to_head ? args.vocabulary : 0, args.width)
                : large(like, to_head ? args.vocabulary : 0, args.width);
    bias = zeros(like, to_bias ? args.vocabulary : 0, 1);
    of_head = to_head ? head.mutable_data_ptr<float>() : nullptr;
    of_bias = to_bias ? bias.mutable_data_ptr<float>() : nullptr;
  }
};

// The gradient of the hidden rows. Where the rows of a block are not contiguous, their sums are formed in a buffer of
// their own and added.
struct HiddenSums {
  const Args& args;
  const Gradients& to;
  std::optional<HiddenProduct> hidden;
  Scratch gathered_sums;

  HiddenSums(const Args& args, const Gradients& to, int64_t most_rows) : args(args), to(to) {
    if (to.hidden.size(0) == 0) return;
    hidden.emplace(args.student);
    if (args.has_invalid_rows()) gathered_sums = Scratch(args.student.hidden, args.fit(most_rows) * args.width * 4);
  }

  void add(const Block& block, bool accumulate) const {
    if (!hidden) return;
    float* out = to.hidden.mutable_data_ptr<float>();
    const int64_t first = block.valid_rows[0];
    const bool contiguous = block.valid_rows[block.count - 1] - first == block.count - 1;
    float* sums = contiguous ? out + first * args.width : gathered_sums.floats();
    HiddenProduct::each(block.first, block.first + block.tokens, [&](int64_t v, int64_t v_end) {
      hidden->pack_transposed(v, v_end);
      const auto source = [&](int64_t row, int64_t rows, int64_t token, int64_t tokens) {
        return GemmSource{block.t + row * block.stride + token - block.first, kFloat32, block.stride, 1, rows, tokens};
      };
      hidden->multiply(block.count, v, v_end, source, sums, v > block.first || (contiguous && accumulate));
    });
    for (int64_t i = 0; i < block.count && !contiguous; ++i)
      args.linear.add_row(out + block.valid_rows[i] * args.width, gathered_sums.floats() + i * args.width, args.width);
  }
};

std::tuple<Tensor, Tensor> forward(const Args& args) {
  Tensor values = zeros(args.student.hidden, args.rows, 1), stats = zeros(args.student.hidden, args.rows, kStats);
  if (args.valid_rows.empty()) return {values, stats};
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<RowStats*>(stats.mutable_data_ptr<float>());
  Block block(args, rows_per_block(args), tokens_per_block(args), false);
  for_steps(args.valid_rows.size(), rows_per_block(args), [&](int64_t begin, int64_t end) {
    block.load_rows(begin, end);
    std::vector<RowSums> sums(end - begin);
    std::vector<char> needs_refinement(end - begin);
    for_steps(args.vocabulary, tokens_per_block(args), [&](int64_t v, int64_t v_end) {
      block.make(v, v_end);
      block.each_row([&](int64_t i, int64_t n, const float* s, float* t) {
        if (args.sparse) return void(value[n] = args.forward_row(n, s, t, stat + n));
        args.divergence.accumulate_part(s, t, v_end - v, args.options.soft, &sums[i].soft);
        if (args.labels) args.accumulate_labels(n, v, v_end - v, s, &sums[i]);
      });
    });
    if (args.sparse) return;
    bool any = false;
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t n = block.valid_rows[i];
      needs_refinement[i] = args.divergence.finish_sums(args.options.soft, sums[i].soft, &stat[n].dense, value + n);
      any |= needs_refinement[i];
    }
    if (any)
      for_steps(args.vocabulary, tokens_per_block(args), [&](int64_t v, int64_t v_end) {
        block.make(v, v_end);
        block.each_row([&](int64_t i, int64_t n, const float* s, float* t) {
          if (needs_refinement[i])
            args.divergence.refine_part(s, t, v_end - v, args.options.soft, stat[n].dense, &sums[i].soft);
        });
      });
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t n = block.valid_rows[i];
      if (needs_refinement[i]) args.divergence.finish_value(args.options.soft, sums[i].soft, &stat[n].dense, value + n);
      value[n] = args.add_labels(value[n], sums[i], stat + n);
    }
  });
  return {values, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Args& args, const Tensor& upstream, const Tensor& stats,
                                            bool to_hidden, bool to_head, bool to_bias) {
  const Gradients to(args, to_hidden, to_head && element_of(args.student.head) == kFloat32, to_bias);
  const bool narrow = to_head && !to.of_head;
  Tensor head = to.head;
  if (narrow) head = torch::stable::new_empty(args.student.head, {args.vocabulary, args.width});
  if (narrow) use_huge_pages(head);
  if (args.valid_rows.empty()) {
    if (narrow) std::memset(head.mutable_data_ptr(), 0, head.numel() * int64_t(head.element_size()));
    return {to.hidden, head, to.bias};
  }
  const Tensor g = torch::stable::contiguous(upstream), of_rows = dense(stats);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const RowStats*>(of_rows.const_data_ptr<float>());
  Block block(args, rows_per_block(args), tokens_per_block(args), to_head);
  const HiddenSums hidden_sums(args, to, rows_per_block(args));
  const Scratch sums(args.student.hidden, narrow ? tokens_per_block(args) * args.width * 4 : 0);
  for_steps(args.vocabulary, tokens_per_block(args), [&](int64_t v, int64_t v_end) {
    float* of_head = narrow ? sums.floats() : to.of_head ? to.of_head + v * args.width : nullptr;
    for_steps(args.valid_rows.size(), rows_per_block(args), [&](int64_t begin, int64_t end) {
      block.load_rows(begin, end);
      block.make(v, v_end);
      block.each_row([&](int64_t, int64_t n, const float* s, float* t) {
        args.differentiate(n, v, v_end - v, s, t, stat[n], up[n]);
      });
      if (to_head || to_bias)
        head_gradient(args.linear, block.student, block.t, block.stride, v_end - v, of_head,
                      to_bias ? to.of_bias + v : nullptr, begin > 0);
      hidden_sums.add(block, v > 0);
    });
    if (narrow)
      parallel_steps(v_end - v, kRows, 0, [&](int64_t begin, int64_t end, char*) {
        char* out = static_cast<char*>(head.mutable_data_ptr()) + (v + begin) * args.width * 2;
        args.linear.scale_row(of_head + begin * args.width, kFloat32, 1, out, element_of(head),
                              (end - begin) * args.width);
      });
  });
  return {to.hidden, head, to.bias};
}

std::tuple<Tensor, Tensor> linear_divergence_fwd(FASTKD_LINEAR_PARAMETERS) {
  FASTKD_LINEAR_CHECK(Check("linear_divergence_fwd"));
  return forward(FASTKD_LINEAR_ARGS);
}

std::tuple<Tensor, Tensor, Tensor> linear_divergence_bwd(const Tensor& grad, const Tensor& stats,
                                                         FASTKD_LINEAR_PARAMETERS, bool to_hidden, bool to_head,
                                                         bool to_bias) {
  const Check check("linear_divergence_bwd");
  FASTKD_LINEAR_CHECK(check);
  check("grad", grad, kF32, "[N]", {hidden.size(0)});
  check("stats", stats, kF32, "[N, stats]", {hidden.size(0), kStats});
  return backward(FASTKD_LINEAR_ARGS, grad, stats, to_hidden, to_head, to_bias);
}

// x * factor from `x` to `out`: what is left to the backward where the gradient was made in the forward.
void scale(const Tensor& x, const Tensor& factor, Tensor out) {
  const int64_t columns = x.size(1), from_item = int64_t(x.element_size()), item = int64_t(out.element_size());
  const float by = *factor.const_data_ptr<float>();
  const Table& table = chosen_table();
  const int from = element_of(x), element = element_of(out);
  parallel_for(0, x.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    table.scale_row(static_cast<const char*>(x.const_data_ptr()) + begin * columns * from_item, from, by,
                    static_cast<char*>(out.mutable_data_ptr()) + begin * columns * item, element,
                    (end - begin) * columns);
  });
}

Tensor linear_divergence_scale(const Tensor& x, const Tensor& factor, const Tensor& like) {
  const Check check("linear_divergence_scale");
  check("x", x, kFloating, "[N, D]", {kAny, kAny});
  check("factor", factor, kF32, "[]", {});
  check.that(like.is_cpu() && (dtype_of(like) & kFloating), "like", "float32, bfloat16 or float16 on the CPU",
             "another");
  Tensor out = torch::stable::new_empty(like, {x.size(0), x.size(1)});
  use_huge_pages(out);
  scale(dense(x), factor, out);
  return out;
}

void linear_divergence_rescale_grad(Tensor x, const Tensor& factor) {
  const Check check("linear_divergence_rescale_grad");
  check("x", x, kFloating, "[N, D]", {kAny, kAny});
  check.contiguous("x", x);
  check("factor", factor, kF32, "[]", {});
  if (*factor.const_data_ptr<float>() != 1) scale(x, factor, x);
}

}  // namespace
}  // namespace fastkd::linear_divergence

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // The same from hidden [N, D] and head [V, D] of both sides (of the sparse teacher: indices, log_probs, tail), times
  // `factor`, plus `hard` times the cross-entropy with `labels`. scale and cap (0: none) shape the logits. Rows [N, 1];
  // gradients (without rows unless asked for) of sum weights * rows (fwd_grad) or sum grad * rows (bwd): in float32,
  // but the head's in its own dtype (fwd_grad: in float32 where that is float16, which is not scaled yet).
#define FASTKD_LINEAR_ARGUMENTS                                                                                   \
  "Tensor hidden, Tensor head, Tensor? bias, Tensor? t_hidden, Tensor? t_head, Tensor? t_bias, Tensor? indices, " \
  "Tensor? log_probs, Tensor? tail, Tensor? mask, Tensor? labels, int kind, float temperature, float mix, "       \
  "float factor, float hard, float scale, float cap, float t_scale, float t_cap"
  m.def("linear_divergence_fwd_grad(Tensor weights, " FASTKD_LINEAR_ARGUMENTS
        ", bool to_hidden, bool to_head, bool to_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_divergence_rows(Tensor(a!) s, Tensor(b!) t, Tensor weights, " FASTKD_LINEAR_ARGUMENTS
        ", bool to_bias) -> (Tensor, Tensor)");
  m.def("linear_divergence_fwd(" FASTKD_LINEAR_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("linear_divergence_bwd(Tensor grad, Tensor stats, " FASTKD_LINEAR_ARGUMENTS
        ", bool to_hidden, bool to_head, bool to_bias) -> (Tensor, Tensor, Tensor)");
  // x * factor in the dtype of `like`, or in place.
  m.def("linear_divergence_scale(Tensor x, Tensor factor, Tensor like) -> Tensor");
  m.def("linear_divergence_rescale_grad(Tensor(a!) x, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("linear_divergence_fwd", TORCH_BOX(&fastkd::linear_divergence::linear_divergence_fwd));
  m.impl("linear_divergence_bwd", TORCH_BOX(&fastkd::linear_divergence::linear_divergence_bwd));
  m.impl("linear_divergence_scale", TORCH_BOX(&fastkd::linear_divergence::linear_divergence_scale));
  m.impl("linear_divergence_rescale_grad", TORCH_BOX(&fastkd::linear_divergence::linear_divergence_rescale_grad));
}
