// Rows over torch's own thread pool; the arithmetic of a row is in divergence/op_isa.cpp.
#include "cpu/divergence/op.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/runtime/tensors.h"
#include "cpu/simd/isa.h"

namespace fastkd::divergence {
namespace {

constexpr int64_t kTogether = 256;  // rows of few columns that are converted to floats and computed at a time
constexpr int64_t kStats = sizeof(RowStats) / sizeof(float);

void check(const char* op, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
           int64_t kind) {
  const Check check(op);
  check("s", student, kFloating, "[N, V]", {kAny, kAny});
  check("t", teacher, kFloating, "[N, V]", {student.size(0), student.size(1)});
  check("mask", mask, kBool, "[N]", {student.size(0)});
  check.that(kind >= 0 && kind < kKinds, "kind", "0 to 6", kind);
}

Options options_of(int64_t kind, double temperature, double mix) {
  return {int(kind), float(1 / temperature), float(mix), float(1 - mix)};
}

// `count` rows of `x` from row i as floats, through `scratch` where x is half precision.
const float* float_rows(const Table& table, const Tensor& x, int element, int64_t i, std::vector<float>& scratch,
                        int64_t count = 1) {
  const int64_t columns = x.size(1);
  if (element != kFloat32 && scratch.empty()) scratch.resize(count * columns);
  const char* row = static_cast<const char*>(x.const_data_ptr()) + i * columns * int64_t(x.element_size());
  return table.as_floats(row, element, scratch.data(), count * columns);
}

// The upstream gradient that each row may expect: `factor`, divided by the number of rows where their mean is taken.
// Rounded as torch rounds it on the way back, so that it equals the one that comes to the last bit.
float expected_upstream(const Tensor& student, const bool* valid, bool mean, double factor) {
  const int64_t rows = student.size(0);
  const int64_t count = valid ? std::count(valid, valid + rows, true) : rows;
  return (mean ? 1.f / float(count > 0 ? count : 1) : 1.f) * float(factor);
}

const bool* mask_data(const std::optional<Tensor>& mask, Tensor* holder) {
  if (!mask) return nullptr;
  *holder = torch::stable::contiguous(*mask);
  return holder->const_data_ptr<bool>();
}

// Values, stats, and (grad: [N, V], or none) the gradient of upstream * value.
std::tuple<Tensor, Tensor> values_and_stats(const Tensor& student, const Tensor& teacher, const bool* valid,
                                            Options options, float* grad, float upstream) {
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher);
  const int64_t rows = s.size(0), columns = s.size(1);
  Tensor values = torch::stable::new_empty(s, {rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(s, {rows, kStats}, ScalarType::Float);
  const int element_s = element_of(s), element_t = element_of(t);
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<RowStats*>(stats.mutable_data_ptr<float>());
  const Table& table = chosen_table();
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch_s, scratch_t;
    if (columns <= table.few_columns) {
      for (int64_t i = begin; i < end; i += kTogether) {
        const int64_t count = std::min(kTogether, end - i);
        table.forward_rows(float_rows(table, s, element_s, i, scratch_s, count),
                           float_rows(table, t, element_t, i, scratch_t, count), count, columns, options, stat + i,
                           value + i, {grad ? grad + i * columns : nullptr, nullptr, upstream});
      }
      for (int64_t i = begin; valid && i < end; ++i) {
        if (valid[i]) continue;
        value[i] = 0;
        stat[i] = {};
        if (grad) std::memset(grad + i * columns, 0, columns * sizeof(float));
      }
      return;
    }
    std::vector<float> scratch(grad ? GradRequest::scratch_size(columns) : 0);
    for (int64_t i = begin; i < end; ++i) {
      float* out = grad ? grad + i * columns : nullptr;
      if (valid && !valid[i]) {
        value[i] = 0;
        stat[i] = {};
        if (out) std::memset(out, 0, columns * sizeof(float));
        continue;
      }
      value[i] =
          table.forward(float_rows(table, s, element_s, i, scratch_s), float_rows(table, t, element_t, i, scratch_t),
                        columns, options, stat + i, {out, scratch.data(), upstream});
    }
  });
  return {values, stats};
}

std::tuple<Tensor, Tensor> divergence_fwd(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                          int64_t kind, double temperature, double mix) {
  check("divergence_fwd", student, teacher, mask, kind);
  Tensor holder;
  const bool* valid = mask_data(mask, &holder);
  return values_and_stats(student, teacher, valid, options_of(kind, temperature, mix), nullptr, 0);
}

// The gradient of float32 rows in the pass that finds the value: half of the exponentials, and the logits are read
// once.
std::tuple<Tensor, Tensor> divergence_fwd_grad(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                               int64_t kind, double temperature, double mix, bool mean, double factor) {
  check("divergence_fwd_grad", student, teacher, mask, kind);
  Check("divergence_fwd_grad")("s", student, kF32, "[N, V]", {kAny, kAny});
  Tensor holder;
  const bool* valid = mask_data(mask, &holder);
  Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1)});
  use_huge_pages(grad);
  const auto [values, stats] =
      values_and_stats(student, teacher, valid, options_of(kind, temperature, mix), grad.mutable_data_ptr<float>(),
                       expected_upstream(student, valid, mean, factor));
  return {values, grad};
}

// Rescales the gradient made for the expected upstream gradient to the one that came; most often they are equal.
void divergence_rescale_grad(Tensor grad, const Tensor& upstream, std::optional<Tensor> mask, bool mean,
                             double factor) {
  const Check check("divergence_rescale_grad");
  check("grad", grad, kF32, "[N, V]", {kAny, kAny});
  check.contiguous("grad", grad);
  check("upstream", upstream, kF32, "[N]", {grad.size(0)});
  check("mask", mask, kBool, "[N]", {grad.size(0)});
  Tensor holder;
  const bool* valid = mask_data(mask, &holder);
  const float expected = expected_upstream(grad, valid, mean, factor);
  const Tensor g = torch::stable::contiguous(upstream);
  const float* up = g.const_data_ptr<float>();
  float* out = grad.mutable_data_ptr<float>();
  const int64_t rows = grad.size(0), columns = grad.size(1);
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if ((valid && !valid[i]) || up[i] == expected) continue;
      const float ratio = up[i] / expected;
      for (int64_t j = i * columns; j < (i + 1) * columns; ++j) out[j] *= ratio;
    }
  });
}

Tensor divergence_bwd(const Tensor& upstream, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                      const Tensor& stats, int64_t kind, double temperature, double mix) {
  check("divergence_bwd", student, teacher, mask, kind);
  Check("divergence_bwd")("grad", upstream, kF32, "[N]", {student.size(0)});
  Check("divergence_bwd")("stats", stats, kF32, "[N, stats]", {student.size(0), kStats});
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher);
  const Tensor g = torch::stable::contiguous(upstream), of_rows = dense(stats);
  const int64_t rows = s.size(0), columns = s.size(1), width = int64_t(s.element_size());
  Tensor grad = torch::stable::new_empty(s, {rows, columns});
  use_huge_pages(grad);
  Tensor holder;
  const bool* valid = mask_data(mask, &holder);
  const int element_s = element_of(s), element_t = element_of(t);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const RowStats*>(of_rows.const_data_ptr<float>());
  char* out = static_cast<char*>(grad.mutable_data_ptr());
  const Options options = options_of(kind, temperature, mix);
  const Table& table = chosen_table();
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch_s, scratch_t;
    if (columns <= table.few_columns) {
      std::vector<float> scratch_out(element_s == kFloat32 ? 0 : kTogether * columns);
      for (int64_t i = begin; i < end; i += kTogether) {
        const int64_t count = std::min(kTogether, end - i);
        char* first = out + i * columns * width;
        float* target = element_s == kFloat32 ? reinterpret_cast<float*>(first) : scratch_out.data();
        table.backward_rows(float_rows(table, s, element_s, i, scratch_s, count),
                            float_rows(table, t, element_t, i, scratch_t, count), count, columns, options, stat + i,
                            up + i, target);
        if (element_s != kFloat32) table.narrow(target, element_s, first, count * columns);
      }
      for (int64_t i = begin; valid && i < end; ++i)
        if (!valid[i]) std::memset(out + i * columns * width, 0, columns * width);
      return;
    }
    std::vector<float> scratch_out(element_s == kFloat32 ? 0 : columns);
    for (int64_t i = begin; i < end; ++i) {
      char* row = out + i * columns * width;
      if (valid && !valid[i]) {
        std::memset(row, 0, columns * width);
        continue;
      }
      float* target = element_s == kFloat32 ? reinterpret_cast<float*>(row) : scratch_out.data();
      table.backward(float_rows(table, s, element_s, i, scratch_s), float_rows(table, t, element_t, i, scratch_t),
                     columns, options, stat[i], up[i], target);
      if (element_s != kFloat32) table.narrow(target, element_s, row, columns);
    }
  });
  return grad;
}

}  // namespace
}  // namespace fastkd::divergence

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // kind: position in fastkd.checks.KINDS. mix: weight of the student in the mixture of skew_kl and jsd.
  m.def("divergence_fwd(Tensor s, Tensor t, Tensor? mask, int kind, float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_bwd(Tensor grad, Tensor s, Tensor t, Tensor? mask, Tensor stats, int kind, float temperature, "
      "float mix) -> Tensor");
  // Rows [N] and the gradient of s for the expected upstream gradient: factor, or factor / N (`mean`); then, for
  // the upstream that came, what is left to do to it.
  m.def(
      "divergence_fwd_grad(Tensor s, Tensor t, Tensor? mask, int kind, float temperature, float mix, bool mean, "
      "float factor) -> (Tensor, Tensor)");
  m.def("divergence_rescale_grad(Tensor(a!) grad, Tensor upstream, Tensor? mask, bool mean, float factor) -> ()");
  // A sparse teacher; tail is the log-mass of the rest.
  m.def(
      "divergence_topk_fwd(Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, int kind, "
      "float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_topk_bwd(Tensor grad, Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, "
      "Tensor stats, int kind, float temperature, float mix) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_fwd", TORCH_BOX(&fastkd::divergence::divergence_fwd));
  m.impl("divergence_fwd_grad", TORCH_BOX(&fastkd::divergence::divergence_fwd_grad));
  m.impl("divergence_rescale_grad", TORCH_BOX(&fastkd::divergence::divergence_rescale_grad));
  m.impl("divergence_bwd", TORCH_BOX(&fastkd::divergence::divergence_bwd));
}
