// A sparse teacher: k tokens with log-probabilities per row, and perhaps the log-mass of the rest as one more token.
#include "cpu/divergence/topk.h"

#include <tuple>
#include <vector>

#include "cpu/simd/isa.h"

namespace fastkd::divergence {
namespace {

constexpr int64_t kStats = sizeof(TopKStats) / sizeof(float);

struct Inputs {
  Tensor s, mask;
  int64_t rows, columns;
  int element;
  bool has_mask;
  TopKTeacher teacher;

  Inputs(const Tensor& student, const Tensor& ids, const Tensor& probs, const std::optional<Tensor>& rest,
         const std::optional<Tensor>& keep)
      : s(torch::stable::contiguous(student)),
        rows(student.size(0)),
        columns(student.size(1)),
        element(element_of(student)),
        has_mask(keep.has_value()),
        teacher(ids, probs, rest, columns) {
    if (has_mask) mask = torch::stable::contiguous(*keep);
  }
  bool valid(int64_t i) const { return !has_mask || mask.const_data_ptr<bool>()[i]; }
  const float* row(const Table& table, int64_t i, std::vector<float>& scratch) const {
    const char* start = static_cast<const char*>(s.const_data_ptr()) + i * columns * int64_t(s.element_size());
    return table.as_floats(start, element, scratch.data(), columns);
  }
};

void check(const Check& check, const Tensor& student, const Tensor& indices, const Tensor& log_probs,
           const std::optional<Tensor>& tail, const std::optional<Tensor>& mask, int64_t kind) {
  check("s", student, kFloating, "[N, V]", {kAny, kAny});
  check("mask", mask, kBool, "[N]", {student.size(0)});
  check.that(kind >= 0 && kind < kKinds, "kind", "0 to 5", kind);
  check_sparse(check, indices, log_probs, tail, student.size(0), kind);
}

std::tuple<Tensor, Tensor> divergence_topk_fwd(const Tensor& student, const Tensor& indices, const Tensor& log_probs,
                                               std::optional<Tensor> tail, std::optional<Tensor> mask, int64_t kind,
                                               double temperature, double mix) {
  check(Check("divergence_topk_fwd"), student, indices, log_probs, tail, mask, kind);
  const Inputs in(student, indices, log_probs, tail, mask);
  Tensor values = torch::stable::new_empty(in.s, {in.rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(in.s, {in.rows, kStats}, ScalarType::Float);
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<TopKStats*>(stats.mutable_data_ptr<float>());
  const Table& table = chosen_table();
  parallel_for(0, in.rows, grain(in.columns), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(in.element == kFloat32 ? 0 : in.columns), rest(in.columns);
    for (int64_t i = begin; i < end; ++i) {
      value[i] = 0;
      stat[i] = {};
      if (in.valid(i))
        value[i] = topk_forward(table, in.teacher, i, in.row(table, i, scratch), in.columns, rest.data(), int(kind),
                                1 / temperature, mix, stat + i);
    }
  });
  return {values, stats};
}

Tensor divergence_topk_bwd(const Tensor& upstream, const Tensor& student, const Tensor& indices,
                           const Tensor& log_probs, std::optional<Tensor> tail, std::optional<Tensor> mask,
                           const Tensor& stats, int64_t kind, double temperature, double mix) {
  const Check op("divergence_topk_bwd");
  check(op, student, indices, log_probs, tail, mask, kind);
  op("grad", upstream, kF32, "[N]", {student.size(0)});
  op("stats", stats, kF32, "[N, stats]", {student.size(0), kStats});
  const Inputs in(student, indices, log_probs, tail, mask);
  const Tensor g = torch::stable::contiguous(upstream), of_rows = dense(stats);
  Tensor grad = torch::stable::new_empty(in.s, {in.rows, in.columns});
  use_huge_pages(grad);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const TopKStats*>(of_rows.const_data_ptr<float>());
  const int64_t width = int64_t(in.s.element_size());
  char* out = static_cast<char*>(grad.mutable_data_ptr());
  const Table& table = chosen_table();
  parallel_for(0, in.rows, grain(in.columns), [&](int64_t begin, int64_t end) {
    const int64_t half = in.element == kFloat32 ? 0 : in.columns;
    std::vector<float> scratch(half), scratch_out(half);
    for (int64_t i = begin; i < end; ++i) {
      char* row = out + i * in.columns * width;
      if (!in.valid(i)) {
        std::memset(row, 0, in.columns * width);
        continue;
      }
      const float* s = in.row(table, i, scratch);
      float* target = half ? scratch_out.data() : reinterpret_cast<float*>(row);
      topk_backward(table, in.teacher, i, s, in.columns, int(kind), 1 / temperature, mix, stat[i], up[i], target);
      if (half) table.narrow(target, in.element, row, in.columns);
    }
  });
  return grad;
}

}  // namespace
}  // namespace fastkd::divergence

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_topk_fwd", TORCH_BOX(&fastkd::divergence::divergence_topk_fwd));
  m.impl("divergence_topk_bwd", TORCH_BOX(&fastkd::divergence::divergence_topk_bwd));
}
