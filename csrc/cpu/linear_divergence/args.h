// What every op of linear_divergence is called with, and the work on one row of its logits, whole or in parts.
#pragma once
#include <cmath>
#include <tuple>

#include "cpu/divergence/topk.h"
#include "cpu/linear_divergence/products.h"
#include "cpu/simd/isa.h"

namespace fastkd::linear_divergence {
namespace {

using Maybe = std::optional<Tensor>;
constexpr int64_t kStats = 8;
constexpr int64_t kSkew = 16;  // floats added to a row's stride: powers of two would fall on the same cache sets

// What a row leaves to the backward.
struct RowStats {
  union {
    divergence::RowStats dense;
    divergence::TopKStats sparse;
  };
  float hard_log_sum;  // of e^s: for the hard labels
};
static_assert(sizeof(RowStats) == kStats * sizeof(float), "stats are [N, kStats]");

// The sums of a row whose tokens come in parts.
struct RowSums {
  divergence::RowSums soft;
  float largest = -__builtin_inff(), label = 0;
  double exponentials = 0;
};

struct Options {
  divergence::Options soft;
  double inverse_temperature, mix;
  float factor, hard;  // of the divergence, and of the cross-entropy with the labels
};

inline void check_side(const Check& check, const char* const names[3], const Tensor& hidden, const Tensor& head,
                       const Maybe& bias, int64_t rows, int64_t tokens) {
  check(names[0], hidden, kFloating, "[N, D]", {rows, kAny});
  check(names[1], head, kFloating, "[V, D]", {tokens, hidden.size(1)});
  check(names[2], bias, kF32, "[V]", {head.size(0)});
}

// Checks the arguments that all ops have.
inline void check_args(const Check& check, const Tensor& hidden, const Tensor& head, const Maybe& bias,
                       const Maybe& t_hidden, const Maybe& t_head, const Maybe& t_bias, const Maybe& indices,
                       const Maybe& log_probs, const Maybe& tail, const Maybe& mask, const Maybe& labels,
                       int64_t kind) {
  constexpr const char *kStudent[] = {"hidden", "head", "bias"}, *kTeacher[] = {"t_hidden", "t_head", "t_bias"};
  check_side(check, kStudent, hidden, head, bias, kAny, kAny);
  const int64_t rows = hidden.size(0), tokens = head.size(0);
  check.that(tokens > 0, "head", "at least one row", "none");
  check.that(kind >= 0 && kind < divergence::kKinds, "kind", "0 to 6", kind);
  check("mask", mask, kBool, "[N]", {rows});
  check("labels", labels, kI64, "[N]", {rows});
  if (indices) return divergence::check_sparse(check, *indices, log_probs, tail, rows, kind);
  check.that(t_hidden && t_head, "t_hidden, t_head", "both, or indices and log_probs", "None");
  check_side(check, kTeacher, *t_hidden, *t_head, t_bias, rows, tokens);
}

struct Args {
  const divergence::Table& divergence = divergence::chosen_table();
  const Table& linear = chosen_table();
  Options options;
  HiddenAndHead student, teacher;
  std::optional<divergence::TopKTeacher> sparse;
  Tensor label_ids;
  const int64_t* labels = nullptr;
  std::vector<int64_t> valid_rows;
  int64_t rows, vocabulary, width;

  Args(const Tensor& hidden, const Tensor& head, const Maybe& bias, const Maybe& t_hidden, const Maybe& t_head,
       const Maybe& t_bias, const Maybe& indices, const Maybe& log_probs, const Maybe& tail, const Maybe& mask,
       const Maybe& hard_labels, int64_t kind, double temperature, double mix, double factor, double hard, double scale,
       double cap, double t_scale, double t_cap)
      : options{{int(kind), float(1 / temperature), float(mix), float(1 - mix)},
                1 / temperature,
                mix,
                float(factor),
                float(hard)},
        student(hidden, head, bias, scale, cap),
        rows(hidden.size(0)),
        vocabulary(head.size(0)),
        width(hidden.size(1)) {
    if (indices)
      sparse.emplace(*indices, *log_probs, tail, vocabulary);
    else
      teacher = HiddenAndHead(*t_hidden, *t_head, t_bias, t_scale, t_cap);
    const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
    const bool* counts = mask ? keep.const_data_ptr<bool>() : nullptr;
    for (int64_t i = 0; i < rows; ++i)
      if (!counts || counts[i]) valid_rows.push_back(i);
    if (hard_labels && hard != 0) {
      label_ids = torch::stable::contiguous(*hard_labels);
      labels = label_ids.const_data_ptr<int64_t>();
      for (int64_t i : valid_rows)
        STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < vocabulary, "labels: expected token ids in [0, ", vocabulary,
                        "), got ", labels[i]);
    }
  }
  bool has_invalid_rows() const { return int64_t(valid_rows.size()) < rows; }
  int64_t fit(int64_t most_rows) const { return std::min<int64_t>(most_rows, valid_rows.size()); }
  static int64_t stride_of(int64_t tokens) { return (tokens + 15) / 16 * 16 + kSkew; }

  // Below, s and t are `count` logits of row n from token `first` on.

  void finish_logits(const HiddenAndHead& side, float* x, int64_t first, int64_t count) const {
    if (side.has_bias || side.changes_logits())
      linear.scale_and_cap(x, side.bias_from(first), side.scale, side.cap, count);
  }

  // The gradient of a row's logits takes the place of t.
  void differentiate(int64_t n, int64_t first, int64_t count, const float* s, float* t, const RowStats& stats,
                     float upstream) const {
    const Options& o = options;
    if (sparse)
      topk_backward(divergence, *sparse, n, s, count, o.soft.kind, o.inverse_temperature, o.mix, stats.sparse,
                    upstream * o.factor, t);
    else
      divergence.backward(s, t, count, o.soft, stats.dense, upstream * o.factor, t);
    if (labels) {
      linear.add_softmax(t, s, stats.hard_log_sum, upstream * o.hard, count);
      const int64_t label = labels[n] - first;
      if (label >= 0 && label < count) t[label] -= upstream * o.hard;
    }
    if (student.changes_logits()) linear.scale_and_cap_gradient(t, s, student.scale, student.cap, count);
  }

  void accumulate_labels(int64_t n, int64_t first, int64_t count, const float* s, RowSums* sums) const {
    const float largest = std::max(sums->largest, divergence.largest(s, count));
    if (largest == -__builtin_inff()) return;
    sums->exponentials = sums->exponentials * std::exp(double(sums->largest) - largest) +
                         divergence.sum_of_exponentials(s, count, 1, largest);
    sums->largest = largest;
    const int64_t label = labels[n] - first;
    if (label >= 0 && label < count) sums->label = s[label];
  }

  float add_labels(float value, const RowSums& sums, RowStats* stats) const {
    if (!labels) return options.factor * value;
    const double log_sum = sums.largest + std::log(sums.exponentials);
    stats->hard_log_sum = float(log_sum);
    return options.factor * value + options.hard * float(log_sum - sums.label);
  }

  // The value of a row whose logits are all there.
  float forward_row(int64_t n, const float* s, float* t, RowStats* stats) const {
    const Options& o = options;
    RowSums sums;
    *stats = {};
    const float value = sparse ? topk_forward(divergence, *sparse, n, s, vocabulary, t, o.soft.kind,
                                              o.inverse_temperature, o.mix, &stats->sparse)
                               : divergence.forward(s, t, vocabulary, o.soft, &stats->dense, {nullptr, nullptr, 0});
    if (labels) accumulate_labels(n, 0, vocabulary, s, &sums);
    return add_labels(value, sums, stats);
  }
};

inline Tensor zeros(const Tensor& like, int64_t rows, int64_t columns, ScalarType type = ScalarType::Float) {
  Tensor x = torch::stable::new_empty(like, {rows, columns}, type);
  if (x.numel()) std::memset(x.mutable_data_ptr(), 0, x.numel() * int64_t(x.element_size()));
  return x;
}

inline Tensor large(const Tensor& like, int64_t rows, int64_t columns, ScalarType type = ScalarType::Float) {
  Tensor x = torch::stable::new_empty(like, {rows, columns}, type);
  use_huge_pages(x);
  return x;
}

}  // namespace
}  // namespace fastkd::linear_divergence

#define FASTKD_LINEAR_PARAMETERS                                                                                   \
  const Tensor &hidden, const Tensor &head, const Maybe &bias, const Maybe &t_hidden, const Maybe &t_head,         \
      const Maybe &t_bias, const Maybe &indices, const Maybe &log_probs, const Maybe &tail, const Maybe &mask,     \
      const Maybe &labels, int64_t kind, double temperature, double mix, double factor, double hard, double scale, \
      double cap, double t_scale, double t_cap
#define FASTKD_LINEAR_CHECK(check) \
  check_args(check, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, kind)
#define FASTKD_LINEAR_ARGS                                                                                           \
  Args(hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, kind, temperature, mix, \
       factor, hard, scale, cap, t_scale, t_cap)
