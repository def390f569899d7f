// gram with the gradient in the forward: it is formed for the expected upstream gradient and rescaled to the one that
// comes. The mathematics is in gram/op.cpp.
#include <tuple>

#include "cpu/gram/levels.h"

namespace fastkd::gram {
namespace {

// The upstream gradient that every value of a level is expected to get: the level's weight, divided by the number of
// values that count where their mean is taken.
std::vector<Upstream> expected_upstream(const Args& args, const Tensor& student, const std::vector<double>& weights,
                                        bool mean) {
  std::vector<Upstream> expected(args.levels.size());
  for (size_t k = 0; k < expected.size(); ++k) {
    const bool sequence = args.levels[k] != kToken, official = args.levels[k] == kOfficial && !args.row;
    const int64_t groups = student.size(sequence ? 1 : 0), length = student.size(sequence ? 0 : 1);
    int64_t count = args.row ? groups * length : official ? length : groups;
    if (args.mask && !official) {
      count = 0;
      const GroupMask mask(args.mask, sequence, length);
      for (int64_t group = 0; group < groups; ++group) {
        const auto valid = int64_t(mask.valid_rows(group).size());
        count += args.row ? valid : valid > 0;
      }
    }
    expected[k].all = float(weights[k]) / (mean && count > 0 ? float(count) : 1.f);
  }
  return expected;
}

std::tuple<Tensors, Tensors, Tensors> gram_fwd_grad(Tensors students, Tensors teachers, std::optional<Tensor> mask,
                                                    std::vector<int64_t> levels, bool row, bool normalize, double eps,
                                                    std::vector<double> weights, bool mean) {
  const Args args = {mask, levels, row, normalize, eps};
  const Check check("gram_fwd_grad");
  check_args(check, students, teachers, args);
  check("students", students, kF32 | kBF16, "[B, N, D]", {kAny, kAny, kAny});
  check.length("weights", weights, int64_t(levels.size()));
  Tensors values, valid, grads;
  for (size_t pair = 0; pair < students.size(); ++pair) {
    GradRequest request = {{gradient_like(students[pair])}, expected_upstream(args, students[pair], weights, mean)};
    all_levels(args, students[pair], teachers[pair], request, &values, &valid);
    grads.push_back(request.out[0]);
  }
  return {values, valid, grads};
}

// Whether every upstream that counts is the expected one times the same number, up to a few roundings; that number.
std::optional<float> common_factor(const std::vector<Upstream>& expected, const Tensor* came, const Tensor* valid) {
  constexpr float kRoundings = 4e-7f;
  std::optional<float> factor;
  for (size_t k = 0; k < expected.size(); ++k) {
    const float* up = came[k].const_data_ptr<float>();
    const bool* counts = valid[k].const_data_ptr<bool>();
    for (int64_t i = 0; i < came[k].numel(); ++i) {
      if (!counts[i]) continue;
      const float ratio = up[i] / expected[k].all;
      if (!factor) factor = ratio;
      if (!(std::abs(ratio - *factor) <= kRoundings * std::abs(*factor))) return std::nullopt;
    }
  }
  return !factor || std::abs(*factor - 1) <= kRoundings ? 1.f : *factor;
}

// Rescales the gradients made for the expected upstream gradient to the one that came; most often they are equal.
void gram_rescale_grads(Tensors gradients, Tensors grads, Tensors valid, Tensors students, Tensors teachers,
                        std::optional<Tensor> mask, std::vector<int64_t> levels, bool row, bool normalize, double eps,
                        std::vector<double> weights, bool mean) {
  const Args args = {mask, levels, row, normalize, eps};
  const Check check("gram_rescale_grads");
  check_args(check, students, teachers, args);
  check_terms(check, "grads", grads, kF32, students, args);
  check_terms(check, "valid", valid, kBool, students, args);
  check.length("weights", weights, int64_t(levels.size()));
  check.length("gradients", gradients, int64_t(students.size()));
  for (size_t i = 0; i < gradients.size(); ++i) {
    check.like("gradients", gradients[i], kF32 | kBF16, students[i], int64_t(i));
    check.contiguous("gradients", gradients[i]);
  }
  for (Tensor& x : valid) x = dense(x);
  const Table& table = chosen_table();
  const size_t terms = levels.size();
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  for (size_t pair = 0; pair < students.size(); ++pair) {
    const std::vector<Upstream> expected = expected_upstream(args, students[pair], weights, mean);
    const std::optional<float> factor = common_factor(expected, &grads[pair * terms], &valid[pair * terms]);
    if (!factor) {
      torch::stable::copy_(gradients[pair],
                           recompute(args, students[pair], teachers[pair], upstream_of(grads, pair, terms)));
      continue;
    }
    if (*factor == 1) continue;
    auto* out = static_cast<char*>(gradients[pair].mutable_data_ptr());
    const int element = element_of(gradients[pair]);
    const int64_t width = students[pair].size(2), bytes = width * int64_t(gradients[pair].element_size());
    const int64_t rows = students[pair].size(0) * students[pair].size(1);
    parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(gram_padded(width));
      for (int64_t i = begin; i < end; ++i) {
        const void* from = out + i * bytes;
        table.weighted_sum(&from, element, &*factor, 1, width, scratch.data(), element, out + i * bytes);
      }
    });
  }
}

}  // namespace
}  // namespace fastkd::gram

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("gram_fwd_grad", TORCH_BOX(&fastkd::gram::gram_fwd_grad));
  m.impl("gram_rescale_grads", TORCH_BOX(&fastkd::gram::gram_rescale_grads));
}
