// linear_divergence where memory counts: blocks of kLowRows rows and kLowWords words; logits exist for a block only.
//
// linear_divergence_fwd    rows' sums are carried from block to block; leaves eight numbers per row.
// linear_divergence_bwd    the same blocks again, words outermost: the logits are made a second time (another Ds + Dt).
//
// Rows that do not count are left out before anything is multiplied. A sparse teacher has no head, and needs whole
// rows. With the gradient in the forward: linear_divergence/gradient_in_forward.cpp.
#include "cpu/linear_divergence/args.h"

namespace fastkd::linear_divergence {
namespace {

constexpr int64_t kSparseRows = 128, kLowRows = 1024, kLowWords = 3 * kDepth;

int64_t low_words(const Args& call) { return call.sparse ? call.words : std::min(call.words, kLowWords); }
int64_t low_rows(const Args& call) { return call.sparse ? kSparseRows : kLowRows; }

// Logits of both sides for some rows and words; the teacher's give way to the gradient.
struct Block {
  const Args& call;
  PackedRows student;
  std::optional<PackedRows> teacher;
  Scratch memory;
  int64_t stride;
  float *s, *t;
  const int64_t* kept = nullptr;
  int64_t count = 0, first = 0, words = 0;

  Block(const Args& call, int64_t most_rows, int64_t most_words, bool turns)
      : call(call),
        student(call.student, call.fit(most_rows), call.gaps(), turns),
        stride(Args::stride_of(most_words)) {
    if (!call.sparse) teacher.emplace(call.teacher, call.fit(most_rows), call.gaps(), false);
    const int64_t size = call.fit(most_rows) * stride;
    memory = Scratch(call.student.hidden, 2 * size * 4);
    s = memory.floats(), t = s + size;
  }

  void take_rows(int64_t begin, int64_t end) {
    if (kept == call.kept.data() + begin && count == end - begin) return;
    kept = call.kept.data() + begin, count = end - begin;
    student.take(kept, count);
    if (teacher) teacher->take(kept, count);
  }

  void make(int64_t begin, int64_t end) {
    first = begin, words = end - begin;
    student.logits(begin, end, s, stride);
    if (teacher) teacher->logits(begin, end, t, stride);
  }

  // f(i, n, s, t) for each row, with its logits; n is the row's number among all.
  template <class F>
  void each_row(const F& f) const {
    parallel_for(0, count, grain(words), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        call.finish(call.student, s + i * stride, first, words);
        if (teacher) call.finish(call.teacher, t + i * stride, first, words);
        f(i, kept[i], s + i * stride, t + i * stride);
      }
    });
  }
};

// The gradients, in float32; without rows where nobody wants them.
struct Gradients {
  Tensor hidden, head, bias;
  float *of_head, *of_bias;

  Gradients(const Args& call, bool to_hidden, bool to_head, bool to_bias) {
    const Tensor& like = call.student.hidden;
    const bool none = call.kept.empty();
    hidden = zeros(like, to_hidden ? call.rows : 0, call.width);
    head = none ? zeros(like, to_head ? call.words : 0, call.width) : large(like, to_head ? call.words : 0, call.width);
    bias = zeros(like, to_bias ? call.words : 0, 1);
    of_head = to_head ? head.mutable_data_ptr<float>() : nullptr;
    of_bias = to_bias ? bias.mutable_data_ptr<float>() : nullptr;
  }
};

// What a block's gradient is multiplied with. Sums of hidden rows that do not lie together are made apart.
struct Pull {
  const Args& call;
  const Gradients& to;
  std::optional<HiddenPull> hidden;
  Scratch apart;

  Pull(const Args& call, const Gradients& to, int64_t most_rows) : call(call), to(to) {
    if (to.hidden.size(0) == 0) return;
    hidden.emplace(call.student);
    if (call.gaps()) apart = Scratch(call.student.hidden, call.fit(most_rows) * call.width * 4);
  }

  void to_hidden(const Block& block, bool accumulate) const {
    if (!hidden) return;
    float* out = to.hidden.mutable_data_ptr<float>();
    const int64_t first = block.kept[0];
    const bool together = block.kept[block.count - 1] - first == block.count - 1;
    float* sums = together ? out + first * call.width : apart.floats();
    HiddenPull::each(block.first, block.first + block.words, [&](int64_t v, int64_t v_end) {
      hidden->turn(v, v_end);
      const auto source = [&](int64_t row, int64_t rows, int64_t word, int64_t words) {
        return GemmSource{block.t + row * block.stride + word - block.first, kFloat32, block.stride, 1, rows, words};
      };
      hidden->multiply(block.count, v, v_end, source, sums, v > block.first || (together && accumulate));
    });
    for (int64_t i = 0; i < block.count && !together; ++i)
      call.linear.add(out + block.kept[i] * call.width, apart.floats() + i * call.width, call.width);
  }
};

std::tuple<Tensor, Tensor> low_forward(const Args& call) {
  Tensor values = zeros(call.student.hidden, call.rows, 1), stats = zeros(call.student.hidden, call.rows, kStats);
  if (call.kept.empty()) return {values, stats};
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<RowStats*>(stats.mutable_data_ptr<float>());
  Block block(call, low_rows(call), low_words(call), false);
  in_steps(call.kept.size(), low_rows(call), [&](int64_t begin, int64_t end) {
    block.take_rows(begin, end);
    std::vector<RowSums> sums(end - begin);
    std::vector<char> again(end - begin);
    in_steps(call.words, low_words(call), [&](int64_t v, int64_t v_end) {
      block.make(v, v_end);
      block.each_row([&](int64_t i, int64_t n, const float* s, float* t) {
        if (call.sparse) return void(value[n] = call.whole_row(n, s, t, stat + n));
        call.divergence.gather(s, t, v_end - v, call.options.soft, &sums[i].soft);
        if (call.labels) call.look_at_labels(n, v, v_end - v, s, &sums[i]);
      });
    });
    if (call.sparse) return;
    bool any = false;
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t n = block.kept[i];
      again[i] = call.divergence.conclude(call.options.soft, sums[i].soft, &stat[n].dense, value + n);
      any |= again[i];
    }
    if (any)
      in_steps(call.words, low_words(call), [&](int64_t v, int64_t v_end) {
        block.make(v, v_end);
        block.each_row([&](int64_t i, int64_t n, const float* s, float* t) {
          if (again[i]) call.divergence.refine(s, t, v_end - v, call.options.soft, stat[n].dense, &sums[i].soft);
        });
      });
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t n = block.kept[i];
      if (again[i]) call.divergence.finish(call.options.soft, sums[i].soft, &stat[n].dense, value + n);
      value[n] = call.add_labels(value[n], sums[i], stat + n);
    }
  });
  return {values, stats};
}

std::tuple<Tensor, Tensor, Tensor> low_backward(const Args& call, const Tensor& upstream, const Tensor& stats,
                                                bool to_hidden, bool to_head, bool to_bias) {
  const Gradients to(call, to_hidden, to_head && element_of(call.student.head) == kFloat32, to_bias);
  const bool narrow = to_head && !to.of_head;
  Tensor head = to.head;
  if (narrow) head = torch::stable::new_empty(call.student.head, {call.words, call.width});
  if (narrow) use_huge_pages(head);
  if (call.kept.empty()) {
    if (narrow) std::memset(head.mutable_data_ptr(), 0, head.numel() * int64_t(head.element_size()));
    return {to.hidden, head, to.bias};
  }
  const Tensor g = torch::stable::contiguous(upstream), of_rows = dense(stats);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const RowStats*>(of_rows.const_data_ptr<float>());
  Block block(call, low_rows(call), low_words(call), to_head);
  const Pull pull(call, to, low_rows(call));
  const Scratch sums(call.student.hidden, narrow ? low_words(call) * call.width * 4 : 0);
  in_steps(call.words, low_words(call), [&](int64_t v, int64_t v_end) {
    float* of_head = narrow ? sums.floats() : to.of_head ? to.of_head + v * call.width : nullptr;
    in_steps(call.kept.size(), low_rows(call), [&](int64_t begin, int64_t end) {
      block.take_rows(begin, end);
      block.make(v, v_end);
      block.each_row([&](int64_t, int64_t n, const float* s, float* t) {
        call.differentiate(n, v, v_end - v, s, t, stat[n], up[n]);
      });
      if (to_head || to_bias)
        pull_head(call.linear, block.student, block.t, block.stride, v_end - v, of_head,
                  to_bias ? to.of_bias + v : nullptr, begin > 0);
      pull.to_hidden(block, v > 0);
    });
    if (narrow)
      share(v_end - v, kRows, 0, [&](int64_t begin, int64_t end, char*) {
        char* out = static_cast<char*>(head.mutable_data_ptr()) + (v + begin) * call.width * 2;
        call.linear.scale(of_head + begin * call.width, kFloat32, 1, out, element_of(head), (end - begin) * call.width);
      });
  });
  return {to.hidden, head, to.bias};
}

std::tuple<Tensor, Tensor> linear_divergence_fwd(FASTKD_LINEAR_PARAMETERS) {
  FASTKD_LINEAR_CHECK(Check("linear_divergence_fwd"));
  return low_forward(FASTKD_LINEAR_CALL);
}

std::tuple<Tensor, Tensor, Tensor> linear_divergence_bwd(const Tensor& grad, const Tensor& stats,
                                                         FASTKD_LINEAR_PARAMETERS, bool to_hidden, bool to_head,
                                                         bool to_bias) {
  const Check check("linear_divergence_bwd");
  FASTKD_LINEAR_CHECK(check);
  check("grad", grad, kF32, "[N]", {hidden.size(0)});
  check("stats", stats, kF32, "[N, stats]", {hidden.size(0), kStats});
  return low_backward(FASTKD_LINEAR_CALL, grad, stats, to_hidden, to_head, to_bias);
}

// x * factor from `x` to `out`: what is left to the backward where the gradient was made in the forward.
void scale(const Tensor& x, const Tensor& factor, Tensor out) {
  const int64_t columns = x.size(1), from_item = int64_t(x.element_size()), item = int64_t(out.element_size());
  const float by = *factor.const_data_ptr<float>();
  const Table& table = chosen_table();
  const int from = element_of(x), element = element_of(out);
  parallel_for(0, x.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    table.scale(static_cast<const char*>(x.const_data_ptr()) + begin * columns * from_item, from, by,
                static_cast<char*>(out.mutable_data_ptr()) + begin * columns * item, element, (end - begin) * columns);
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
