// Rows over torch's own thread pool; the arithmetic of a row is in divergence_isa.cpp.
#include "cpu/divergence.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tensors.h"

FASTKD_DECLARE(DivergenceTable, divergence);

namespace fastkd {
namespace {

constexpr int64_t kStats = sizeof(DivergenceStats) / sizeof(float);

DivergenceOptions options(int64_t kind, double temperature, double mix) {
  STD_TORCH_CHECK(kind >= 0 && kind < kDivergenceKinds, "kind: expected 0 to 6");
  return {int(kind), float(1 / temperature), float(mix)};
}

// Row i of `x` as floats, through `scratch` where x is half precision.
const float* float_row(const DivergenceTable& table, const Tensor& x, int element, int64_t i,
                       std::vector<float>& scratch) {
  const int64_t columns = x.size(1);
  if (element != kFloat32 && scratch.empty()) scratch.resize(columns);
  const char* row = static_cast<const char*>(x.const_data_ptr()) + i * columns * int64_t(x.element_size());
  return table.as_floats(row, element, scratch.data(), columns);
}

std::tuple<Tensor, Tensor> divergence_fwd(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                          int64_t kind, double temperature, double mix) {
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher);
  const int64_t rows = s.size(0), columns = s.size(1);
  Tensor values = torch::stable::new_empty(s, {rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(s, {rows, kStats}, ScalarType::Float);
  const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
  const bool* kept = mask ? keep.const_data_ptr<bool>() : nullptr;
  const int element_s = element_of(s), element_t = element_of(t);
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<DivergenceStats*>(stats.mutable_data_ptr<float>());
  const DivergenceOptions how = options(kind, temperature, mix);
  const DivergenceTable& table = FASTKD_CHOOSE(divergence);
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch_s, scratch_t;
    for (int64_t i = begin; i < end; ++i) {
      if (kept && !kept[i]) {
        value[i] = 0;
        stat[i] = {};
        continue;
      }
      value[i] = table.forward(float_row(table, s, element_s, i, scratch_s),
                               float_row(table, t, element_t, i, scratch_t), columns, how, stat + i);
    }
  });
  return {values, stats};
}

Tensor divergence_bwd(const Tensor& upstream, const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                      const Tensor& stats, int64_t kind, double temperature, double mix) {
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher);
  const Tensor g = torch::stable::contiguous(upstream);
  const int64_t rows = s.size(0), columns = s.size(1), width = int64_t(s.element_size());
  Tensor grad = torch::stable::new_empty(s, {rows, columns});
  use_huge_pages(grad);
  const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
  const bool* kept = mask ? keep.const_data_ptr<bool>() : nullptr;
  const int element_s = element_of(s), element_t = element_of(t);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const DivergenceStats*>(stats.const_data_ptr<float>());
  char* out = static_cast<char*>(grad.mutable_data_ptr());
  const DivergenceOptions how = options(kind, temperature, mix);
  const DivergenceTable& table = FASTKD_CHOOSE(divergence);
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch_s, scratch_t, scratch_out(element_s == kFloat32 ? 0 : columns);
    for (int64_t i = begin; i < end; ++i) {
      char* row = out + i * columns * width;
      if (kept && !kept[i]) {
        std::memset(row, 0, columns * width);
        continue;
      }
      float* target = element_s == kFloat32 ? reinterpret_cast<float*>(row) : scratch_out.data();
      table.backward(float_row(table, s, element_s, i, scratch_s), float_row(table, t, element_t, i, scratch_t),
                     columns, how, stat[i], up[i], target);
      if (element_s != kFloat32) table.narrow(target, element_s, row, columns);
    }
  });
  return grad;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_fwd", TORCH_BOX(&fastkd::divergence_fwd));
  m.impl("divergence_bwd", TORCH_BOX(&fastkd::divergence_bwd));
}
