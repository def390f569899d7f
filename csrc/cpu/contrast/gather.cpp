// Losses against rows of a bank that each query chooses by an index: NCE, and InfoNCE's gathered form. A query belongs
// to one thread. The gradient is formed with the loss (contrast/gather_isa.cpp says why); the backward scales it.
#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/contrast/op.h"
#include "cpu/contrast/rows.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {

Tensor nce_partition(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& z, double temperature,
                     int64_t n_data, std::optional<Tensor> scale);

namespace {

ScoreOptions options(double scale, double shift) {
  const float s = float(scale), h = float(shift);
  return {s, float(scale - s), h, float(shift - h)};
}

// Queries and the bank that their index chooses from.
struct QueryAndBank {
  Tensor query, bank;
  QueryAndBank(const Tensor& query, const Tensor& bank)
      : query(with_contiguous_rows(query)), bank(with_contiguous_rows(bank)) {}
};

// f(side, i, rows, query, sum) for every query of every side whose indices are in range; one that is not is an error
// after the others.
template <class F>
void for_each_query(const std::vector<QueryAndBank>& sides, const Tensor& index, F&& f) {
  const Table& table = chosen_table();
  const GatherTable& gather = chosen_gather_table();
  const int64_t queries = index.size(0), count = index.size(1), width = sides[0].query.size(1);
  const int64_t padded = padded_width(width), *indices = index.const_data_ptr<int64_t>();
  std::atomic<int64_t> bank_rows{-1};
  parallel_for(0, queries * int64_t(sides.size()), grain(count * width), [&](int64_t t, int64_t end) {
    std::vector<float> scratch((kGathered + 2) * padded + 16);
    float *sum = aligned(scratch.data()), *row = sum + padded;
    for (; t < end; ++t) {
      const int64_t side = t / queries, i = t % queries;
      const Tensor &query = sides[side].query, &bank = sides[side].bank;
      const Gathered rows = {static_cast<const char*>(bank.const_data_ptr()),
                             element_of_bank(bank),
                             bank.stride(0) * int64_t(bank.element_size()),
                             width,
                             padded,
                             indices + i * count,
                             count,
                             nullptr,
                             nullptr,
                             0,
                             row + padded};
      if (!gather.indices_in_range(rows.index, count, bank.size(0))) {
        bank_rows = bank.size(0);
        continue;
      }
      std::fill_n(scratch.data(), scratch.size(), 0.f);
      float_row(table, query, i, row);
      f(side, i, rows, row, sum);
    }
  });
  STD_TORCH_CHECK(bank_rows < 0, "index: indices must lie in [0, ", bank_rows.load(), "), the rows of bank");
}

std::tuple<Tensor, Tensor> nce_fwd(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& shift,
                                   double temperature, bool gradient_in_forward, std::optional<Tensor> scale) {
  const Check check("nce_fwd");
  check_bank(check, query, bank, scale);
  check("index", index, kI64, "[B, K]", {query.size(0), kAny});
  check.that(index.size(1) > 0, "index", "the positive in column 0", "no columns");
  check("shift", shift, kF64, "[]", {});
  const int64_t width = query.size(1);
  if (scale) scale = torch::stable::contiguous(*scale);
  Tensor loss = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Float);
  Tensor unit_grad =
      torch::stable::new_empty(query, {gradient_in_forward ? query.size(0) : 0, width}, ScalarType::Float);
  float *losses = loss.mutable_data_ptr<float>(), *unit_grads = unit_grad.mutable_data_ptr<float>();
  const ScoreOptions score_options = options(1 / temperature, *shift.const_data_ptr<double>());
  const GatherTable& gather = chosen_gather_table();
  for_each_query({{query, bank}}, torch::stable::contiguous(index),
                 [&](int64_t, int64_t i, Gathered rows, const float* row, float* sum) {
                   rows.scales = scales_of(scale);
                   losses[i] = float(gather.nce(rows, row, score_options, gradient_in_forward ? sum : nullptr));
                   for (int64_t d = 0; gradient_in_forward && d < width; ++d)
                     unit_grads[i * width + d] = sum[d] * score_options.scale;
                 });
  return {loss, unit_grad};
}

// Both anchors at once: half the sum of their losses, what either query's gradient is for upstream 1, and z as it is
// from now on. A z that cannot be set yet (no finite score) counts as 1.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nce_pair(const Tensor& query_a, const Tensor& query_b,
                                                            const Tensor& bank_a, const Tensor& bank_b,
                                                            const Tensor& index, const Tensor& z_a, const Tensor& z_b,
                                                            double noise, double temperature, int64_t n_data) {
  const Check check("nce_pair");
  check_bank(check, query_a, bank_a, std::nullopt, "query_a", "bank_a");
  check_bank(check, query_b, bank_b, std::nullopt, "query_b", "bank_b");
  check("query_b", query_b, kFloating, "[B, D]", {query_a.size(0), query_a.size(1)});
  check("index", index, kI64, "[B, K]", {query_a.size(0), kAny});
  check.that(index.size(1) > 0, "index", "the positive in column 0", "no columns");
  check("z_a", z_a, kF32, "[]", {});
  check("z_b", z_b, kF32, "[]", {});
  const std::vector<QueryAndBank> sides = {{query_a, bank_a}, {query_b, bank_b}};
  const Tensor rows = torch::stable::contiguous(index);
  const int64_t count = query_a.size(0), width = query_a.size(1), negatives = index.size(1) - 1;
  const Tensor z[2] = {nce_partition(sides[0].query, sides[0].bank, rows, z_a, temperature, n_data, std::nullopt),
                       nce_partition(sides[1].query, sides[1].bank, rows, z_b, temperature, n_data, std::nullopt)};
  ScoreOptions score_options[2];
  for (int s = 0; s < 2; ++s) {
    const double now = *z[s].const_data_ptr<float>();
    score_options[s] = options(1 / temperature, std::log(now > 0 ? now : 1.) + std::log(noise));
  }
  const double dropped = double(negatives) * (std::log(double(negatives) / double(n_data)) - std::log(noise));
  Tensor loss = torch::stable::new_empty(query_a, {count}, ScalarType::Float);
  std::vector<double> losses(2 * count);
  Tensor unit_grad[2] = {torch::stable::new_empty(query_a, {count, width}, ScalarType::Float),
                         torch::stable::new_empty(query_b, {count, width}, ScalarType::Float)};
  float* unit_grads[2] = {unit_grad[0].mutable_data_ptr<float>(), unit_grad[1].mutable_data_ptr<float>()};
  const GatherTable& gather = chosen_gather_table();
  for_each_query(sides, rows, [&](int64_t side, int64_t i, const Gathered& gathered, const float* row, float* sum) {
    losses[side * count + i] = gather.nce(gathered, row, score_options[side], sum);
    for (int64_t d = 0; d < width; ++d) unit_grads[side][i * width + d] = sum[d] * score_options[side].scale * 0.5f;
  });
  for (int64_t i = 0; i < count; ++i)
    loss.mutable_data_ptr<float>()[i] = float((losses[i] + losses[count + i]) / 2 - dropped);
  return {loss, unit_grad[0], unit_grad[1], z[0], z[1]};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_gathered(const Tensor& query, const Tensor& positive,
                                                             const Tensor& bank, const Tensor& index,
                                                             const std::optional<Tensor>& query_ids,
                                                             const std::optional<Tensor>& bank_ids,
                                                             const std::optional<Tensor>& scale,
                                                             double inverse_temperature, bool gradient_in_forward) {
  const int64_t count = query.size(0), width = query.size(1);
  Tensor loss = torch::stable::new_empty(query, {count}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(query, {count}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(query, {count}, ScalarType::Float);
  Tensor unit_grad = torch::stable::new_empty(query, {gradient_in_forward ? count : 0, width}, ScalarType::Float);
  float *losses = loss.mutable_data_ptr<float>(), *weights = weight.mutable_data_ptr<float>(),
        *lses = lse.mutable_data_ptr<float>();
  float* unit_grads = unit_grad.mutable_data_ptr<float>();
  const ScoreOptions score_options = options(inverse_temperature, 0);
  const Table& table = chosen_table();
  const GatherTable& gather = chosen_gather_table();
  for_each_query({{query, bank}}, index, [&](int64_t, int64_t i, Gathered rows, const float* row, float* sum) {
    rows.scales = scales_of(scale);
    if (bank_ids) rows.ids = bank_ids->const_data_ptr<int64_t>(), rows.own = query_ids->const_data_ptr<int64_t>()[i];
    float largest;
    const double mass = gather.softmax(rows, row, score_options, &largest, gradient_in_forward ? sum : nullptr);
    float_row(table, positive, i, rows.scratch);
    finish_row(row, rows.scratch, width, inverse_temperature, largest, mass, sum,
               {losses + i, weights + i, lses + i, gradient_in_forward ? unit_grads + i * width : nullptr});
  });
  return {loss, unit_grad, weight, lse};
}

}  // namespace fastkd::contrast

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("nce_fwd", TORCH_BOX(&fastkd::contrast::nce_fwd));
  m.impl("nce_pair", TORCH_BOX(&fastkd::contrast::nce_pair));
}
