// divergence between hidden @ head^T of two models, a block of rows x words at a time; logits exist for a block only.
//
// linear_divergence_speed  blocks of kSpeedRows rows and all words: the logits are there when a row's sums are known,
// so
//                          the gradient is formed at once (3 Ds + Dt products of rows x words), in float32.
// linear_divergence_fwd    blocks of kLowRows rows and kLowWords words, rows' sums carried from block to block; leaves
//                          eight numbers per row.
// linear_divergence_bwd    the same blocks again, words outermost: the logits are made a second time (another Ds + Dt).
//
// Rows that do not count are left out before anything is multiplied. A sparse teacher has no head, and needs whole
// rows.
#include <array>
#include <tuple>

#include "cpu/divergence_topk.h"
#include "cpu/isa.h"
#include "cpu/linear_products.h"

FASTKD_DECLARE(DivergenceTable, divergence);
FASTKD_DECLARE(LinearTable, linear_divergence);

namespace fastkd {
namespace {

using Maybe = std::optional<Tensor>;
constexpr int64_t kSpeedRows = 256, kLowRows = 1024, kLowWords = 3 * kDepth, kStats = 8;
constexpr int64_t kSkew = 16;  // floats added to a row's stride: powers of two would fall on the same cache sets

// What a row leaves to the backward.
struct RowStats {
  union {
    DivergenceStats dense;
    TopKStats sparse;
  };
  float hard_log_sum;  // of e^s: for the hard labels
  float unused;
};
static_assert(sizeof(RowStats) == kStats * sizeof(float), "stats are [N, kStats]");

// A row whose words come in parts.
struct RowSums {
  DivergenceSums soft;
  float largest = -__builtin_inff(), label = 0;
  double exponentials = 0;
};

struct Options {
  DivergenceOptions soft;
  double inverse_temperature, mix;
  float factor, hard;  // of the divergence, and of the cross-entropy with the labels
};

struct Call {
  const DivergenceTable& divergence = FASTKD_CHOOSE(divergence);
  const LinearTable& linear = FASTKD_CHOOSE(linear_divergence);
  Options options;
  LinearSide student, teacher;
  std::optional<TopKTeacher> sparse;
  Tensor label_ids;
  const int64_t* labels = nullptr;
  std::vector<int64_t> kept;
  int64_t rows, words, width;

  Call(const Tensor& hidden, const Tensor& head, const Maybe& bias, const Maybe& t_hidden, const Maybe& t_head,
       const Maybe& t_bias, const Maybe& indices, const Maybe& log_probs, const Maybe& tail, const Maybe& mask,
       const Maybe& hard_labels, int64_t kind, double temperature, double mix, double factor, double hard, double scale,
       double cap, double t_scale, double t_cap)
      : options{{int(kind), float(1 / temperature), float(mix)}, 1 / temperature, mix, float(factor), float(hard)},
        student(hidden, head, bias, scale, cap),
        rows(hidden.size(0)),
        words(head.size(0)),
        width(hidden.size(1)) {
    STD_TORCH_CHECK(kind >= 0 && kind < kDivergenceKinds, "kind: expected 0 to 6");
    if (indices)
      sparse.emplace(*indices, *log_probs, tail, words);
    else
      teacher = LinearSide(*t_hidden, *t_head, t_bias, t_scale, t_cap);
    const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
    const bool* counts = mask ? keep.const_data_ptr<bool>() : nullptr;
    for (int64_t i = 0; i < rows; ++i)
      if (!counts || counts[i]) kept.push_back(i);
    if (hard_labels && hard != 0) {
      label_ids = torch::stable::contiguous(*hard_labels);
      labels = label_ids.const_data_ptr<int64_t>();
      for (int64_t i : kept)
        STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < words, "labels: a label lies outside the vocabulary");
    }
  }
  bool gaps() const { return int64_t(kept.size()) < rows; }
  int64_t low_words() const { return sparse ? words : std::min(words, kLowWords); }
  int64_t low_rows() const { return sparse ? kSpeedRows : kLowRows; }
};

// Logits of both sides for some rows and words; the teacher's give way to the gradient.
struct Block {
  const Call& call;
  PackedRows student;
  std::optional<PackedRows> teacher;
  Scratch memory;
  int64_t stride;
  float *s, *t;
  const int64_t* kept = nullptr;
  int64_t count = 0, first = 0, words = 0;

  Block(const Call& call, int64_t most_rows, int64_t most_words, bool turns)
      : call(call),
        student(call.student, fit(call, most_rows), call.gaps(), turns),
        stride((most_words + 15) / 16 * 16 + kSkew) {
    if (!call.sparse) teacher.emplace(call.teacher, fit(call, most_rows), call.gaps(), false);
    const int64_t size = fit(call, most_rows) * stride;
    memory = Scratch(call.student.hidden, 2 * size * 4);
    s = memory.floats(), t = s + size;
  }
  static int64_t fit(const Call& call, int64_t rows) { return std::min<int64_t>(rows, call.kept.size()); }

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
        finish(call.student, s + i * stride);
        if (teacher) finish(call.teacher, t + i * stride);
        f(i, kept[i], s + i * stride, t + i * stride);
      }
    });
  }

  void finish(const LinearSide& side, float* x) const {
    if (side.has_bias || side.shaped()) call.linear.shape(x, side.bias_from(first), side.scale, side.cap, words);
  }

  // The gradient of a row's logits takes the place of t.
  void differentiate(int64_t n, const float* s, float* t, const RowStats& stats, float upstream) const {
    const Options& o = call.options;
    if (call.sparse)
      topk_backward(call.divergence, *call.sparse, n, s, words, o.soft.kind, o.inverse_temperature, o.mix, stats.sparse,
                    upstream * o.factor, t);
    else
      call.divergence.backward(s, t, words, o.soft, stats.dense, upstream * o.factor, t);
    if (call.labels) {
      call.linear.add_softmax(t, s, stats.hard_log_sum, upstream * o.hard, words);
      const int64_t label = call.labels[n] - first;
      if (label >= 0 && label < words) t[label] -= upstream * o.hard;
    }
    if (call.student.shaped()) call.linear.unshape(t, s, call.student.scale, call.student.cap, words);
  }

  void look_at_labels(int64_t n, const float* s, RowSums* sums) const {
    const float largest = std::max(sums->largest, call.divergence.largest(s, words));
    if (largest == -__builtin_inff()) return;
    sums->exponentials = sums->exponentials * std::exp(double(sums->largest) - largest) +
                         call.divergence.sum_of_exponentials(s, words, 1, 0, largest);
    sums->largest = largest;
    const int64_t label = call.labels[n] - first;
    if (label >= 0 && label < words) sums->label = s[label];
  }

  float add_labels(float value, const RowSums& sums, RowStats* stats) const {
    const Options& o = call.options;
    if (!call.labels) return o.factor * value;
    const double log_sum = sums.largest + std::log(sums.exponentials);
    stats->hard_log_sum = float(log_sum);
    return o.factor * value + o.hard * float(log_sum - sums.label);
  }

  // A row that is all there.
  float whole_row(int64_t n, const float* s, float* t, RowStats* stats) const {
    const Options& o = call.options;
    RowSums sums;
    *stats = {};
    const float value = call.sparse
                            ? topk_forward(call.divergence, *call.sparse, n, s, words, t, o.soft.kind,
                                           o.inverse_temperature, o.mix, &stats->sparse)
                            : call.divergence.forward(s, t, words, o.soft, &stats->dense, {nullptr, nullptr, 0});
    if (call.labels) look_at_labels(n, s, &sums);
    return add_labels(value, sums, stats);
  }
};

Tensor zeros(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor x = torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
  if (x.numel()) std::memset(x.mutable_data_ptr(), 0, x.numel() * sizeof(float));
  return x;
}

Tensor large(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor x = torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
  use_huge_pages(x);
  return x;
}

// The gradients, in float32; without rows where nobody wants them.
struct Gradients {
  Tensor hidden, head, bias;
  float *of_head, *of_bias;

  Gradients(const Call& call, bool to_hidden, bool to_head, bool to_bias) {
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
  const Call& call;
  const Gradients& to;
  std::optional<HiddenPull> hidden;
  Scratch apart;

  Pull(const Call& call, const Gradients& to, int64_t most_rows) : call(call), to(to) {
    if (to.hidden.size(0) == 0) return;
    hidden.emplace(call.student);
    if (call.gaps()) apart = Scratch(call.student.hidden, Block::fit(call, most_rows) * call.width * 4);
  }

  void to_hidden(const Block& block, bool accumulate) const {
    if (!hidden) return;
    float* out = to.hidden.mutable_data_ptr<float>();
    const int64_t first = block.kept[0];
    const bool together = block.kept[block.count - 1] - first == block.count - 1;
    float* sums = together ? out + first * call.width : apart.floats();
    hidden->run(block.t, block.stride, block.count, block.first, block.first + block.words, sums,
                together && accumulate);
    for (int64_t i = 0; i < block.count && !together; ++i)
      call.linear.add(out + block.kept[i] * call.width, apart.floats() + i * call.width, call.width);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> speed(const Call& call, const Tensor& weights, bool to_hidden, bool to_head,
                                                 bool to_bias) {
  Tensor values = zeros(call.student.hidden, call.rows, 1);
  const Gradients to(call, to_hidden, to_head, to_bias);
  if (call.kept.empty()) return {values, to.hidden, to.head, to.bias};
  const Tensor w = torch::stable::contiguous(weights);
  const float* weight = w.const_data_ptr<float>();
  float* value = values.mutable_data_ptr<float>();
  Block block(call, kSpeedRows, call.words, to_head);
  const Pull pull(call, to, kSpeedRows);
  in_steps(call.kept.size(), kSpeedRows, [&](int64_t begin, int64_t end) {
    block.take_rows(begin, end);
    block.make(0, call.words);
    block.each_row([&](int64_t, int64_t n, const float* s, float* t) {
      RowStats stats;
      value[n] = block.whole_row(n, s, t, &stats);
      if (to_hidden || to_head || to_bias) block.differentiate(n, s, t, stats, weight[n]);
    });
    if (to_head || to_bias)
      pull_head(call.linear, block.student, block.t, block.stride, call.words, to.of_head, to.of_bias, begin > 0);
    pull.to_hidden(block, false);
  });
  return {values, to.hidden, to.head, to.bias};
}

std::tuple<Tensor, Tensor> low_forward(const Call& call) {
  Tensor values = zeros(call.student.hidden, call.rows, 1), stats = zeros(call.student.hidden, call.rows, kStats);
  if (call.kept.empty()) return {values, stats};
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<RowStats*>(stats.mutable_data_ptr<float>());
  Block block(call, call.low_rows(), call.low_words(), false);
  in_steps(call.kept.size(), call.low_rows(), [&](int64_t begin, int64_t end) {
    block.take_rows(begin, end);
    std::vector<RowSums> sums(end - begin);
    std::vector<char> again(end - begin);
    in_steps(call.words, call.low_words(), [&](int64_t v, int64_t v_end) {
      block.make(v, v_end);
      block.each_row([&](int64_t i, int64_t n, const float* s, float* t) {
        if (call.sparse) return void(value[n] = block.whole_row(n, s, t, stat + n));
        call.divergence.gather(s, t, v_end - v, call.options.soft, &sums[i].soft);
        if (call.labels) block.look_at_labels(n, s, &sums[i]);
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
      in_steps(call.words, call.low_words(), [&](int64_t v, int64_t v_end) {
        block.make(v, v_end);
        block.each_row([&](int64_t i, int64_t n, const float* s, float* t) {
          if (again[i]) call.divergence.refine(s, t, v_end - v, call.options.soft, stat[n].dense, &sums[i].soft);
        });
      });
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t n = block.kept[i];
      if (again[i]) call.divergence.settle(call.options.soft, sums[i].soft, &stat[n].dense, value + n);
      value[n] = block.add_labels(value[n], sums[i], stat + n);
    }
  });
  return {values, stats};
}

std::tuple<Tensor, Tensor, Tensor> low_backward(const Call& call, const Tensor& upstream, const Tensor& stats,
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
  const Tensor g = torch::stable::contiguous(upstream);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const RowStats*>(stats.const_data_ptr<float>());
  Block block(call, call.low_rows(), call.low_words(), to_head);
  const Pull pull(call, to, call.low_rows());
  const Scratch sums(call.student.hidden, narrow ? call.low_words() * call.width * 4 : 0);
  in_steps(call.words, call.low_words(), [&](int64_t v, int64_t v_end) {
    float* of_head = narrow ? sums.floats() : to.of_head ? to.of_head + v * call.width : nullptr;
    in_steps(call.kept.size(), call.low_rows(), [&](int64_t begin, int64_t end) {
      block.take_rows(begin, end);
      block.make(v, v_end);
      block.each_row(
          [&](int64_t, int64_t n, const float* s, float* t) { block.differentiate(n, s, t, stat[n], up[n]); });
      if (to_head || to_bias)
        pull_head(call.linear, block.student, block.t, block.stride, v_end - v, of_head,
                  to_bias ? to.of_bias + v : nullptr, begin > 0);
      pull.to_hidden(block, v > 0);
    });
    if (narrow)
      share(v_end - v, kRows, 0, [&](int64_t begin, int64_t end, char*) {
        char* out = static_cast<char*>(head.mutable_data_ptr()) + (v + begin) * call.width * 2;
        call.linear.write(of_head + begin * call.width, element_of(head), 1, out, (end - begin) * call.width);
      });
  });
  return {to.hidden, head, to.bias};
}

#define FASTKD_LINEAR_PARAMETERS                                                                                   \
  const Tensor &hidden, const Tensor &head, const Maybe &bias, const Maybe &t_hidden, const Maybe &t_head,         \
      const Maybe &t_bias, const Maybe &indices, const Maybe &log_probs, const Maybe &tail, const Maybe &mask,     \
      const Maybe &labels, int64_t kind, double temperature, double mix, double factor, double hard, double scale, \
      double cap, double t_scale, double t_cap
#define FASTKD_LINEAR_CALL                                                                                           \
  Call(hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, kind, temperature, mix, \
       factor, hard, scale, cap, t_scale, t_cap)

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_divergence_speed(const Tensor& weights, FASTKD_LINEAR_PARAMETERS,
                                                                   bool to_hidden, bool to_head, bool to_bias) {
  return speed(FASTKD_LINEAR_CALL, weights, to_hidden, to_head, to_bias);
}

std::tuple<Tensor, Tensor> linear_divergence_fwd(FASTKD_LINEAR_PARAMETERS) { return low_forward(FASTKD_LINEAR_CALL); }

std::tuple<Tensor, Tensor, Tensor> linear_divergence_bwd(const Tensor& grad, const Tensor& stats,
                                                         FASTKD_LINEAR_PARAMETERS, bool to_hidden, bool to_head,
                                                         bool to_bias) {
  return low_backward(FASTKD_LINEAR_CALL, grad, stats, to_hidden, to_head, to_bias);
}

// x * factor, in the dtype of `like`: what is left to do in the backward of the speed mode.
Tensor linear_divergence_scale(const Tensor& x, const Tensor& factor, const Tensor& like) {
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(like, {rows, columns});
  use_huge_pages(out);
  const float by = *factor.const_data_ptr<float>();
  const LinearTable& table = FASTKD_CHOOSE(linear_divergence);
  const int element = element_of(out);
  const int64_t item = int64_t(out.element_size());
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    table.write(x.const_data_ptr<float>() + begin * columns, element, by,
                static_cast<char*>(out.mutable_data_ptr()) + begin * columns * item, (end - begin) * columns);
  });
  return out;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("linear_divergence_speed", TORCH_BOX(&fastkd::linear_divergence_speed));
  m.impl("linear_divergence_fwd", TORCH_BOX(&fastkd::linear_divergence_fwd));
  m.impl("linear_divergence_bwd", TORCH_BOX(&fastkd::linear_divergence_bwd));
  m.impl("linear_divergence_scale", TORCH_BOX(&fastkd::linear_divergence_scale));
}
