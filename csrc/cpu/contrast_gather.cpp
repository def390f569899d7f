// Losses against rows of a bank that each query chooses by an index: NCE, and InfoNCE's gathered form. A query belongs
// to one thread. The gradient is formed with the loss (contrast_gather_isa.cpp says why); the backward scales it.
#include <atomic>
#include <tuple>

#include "cpu/contrast.h"
#include "cpu/contrast_rows.h"
#include "cpu/isa.h"

FASTKD_DECLARE(ContrastTable, contrast);
FASTKD_DECLARE(ContrastGatherTable, contrast_gather);

namespace fastkd {
namespace {

ScoreOptions options(double scale, double shift) {
  const float s = float(scale), h = float(shift);
  return {s, float(scale - s), h, float(shift - h)};
}

// f(i, rows, query, sum) for every query whose indices are in range; one that is not is an error after the others.
template <class F>
void for_each_query(const Tensor& query, const Tensor& bank, const Tensor& index, F&& f) {
  const ContrastTable& table = FASTKD_CHOOSE(contrast);
  const ContrastGatherTable& gather = FASTKD_CHOOSE(contrast_gather);
  const int64_t count = index.size(1), width = query.size(1), padded = padded_width(width);
  const int64_t* indices = index.const_data_ptr<int64_t>();
  std::atomic<bool> bad{false};
  parallel_for(0, query.size(0), grain(count * width), [&](int64_t i, int64_t end) {
    std::vector<float> memory((kGathered + 2) * padded + 16);
    float *sum = aligned(memory.data()), *row = sum + padded;
    for (; i < end; ++i) {
      const Gathered rows = {static_cast<const char*>(bank.const_data_ptr()),
                             element_of(bank),
                             bank.stride(0) * int64_t(bank.element_size()),
                             width,
                             padded,
                             indices + i * count,
                             count,
                             nullptr,
                             0,
                             row + padded};
      if (!gather.in_range(rows.index, count, bank.size(0))) {
        bad = true;
        continue;
      }
      std::fill_n(memory.data(), memory.size(), 0.f);
      float_row(table, query, i, row);
      f(i, rows, row, sum);
    }
  });
  STD_TORCH_CHECK(!bad, "index: indices must lie in [0, ", bank.size(0), "), the rows of bank");
}

std::tuple<Tensor, Tensor> nce_fwd(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& shift,
                                   double temperature, bool with_direction) {
  const Tensor q = with_contiguous_rows(query), n = with_contiguous_rows(bank);
  const int64_t width = q.size(1);
  Tensor loss = torch::stable::new_empty(q, {q.size(0)}, ScalarType::Float);
  Tensor direction = torch::stable::new_empty(q, {with_direction ? q.size(0) : 0, width}, ScalarType::Float);
  float *losses = loss.mutable_data_ptr<float>(), *directions = direction.mutable_data_ptr<float>();
  const ScoreOptions how = options(1 / temperature, *shift.const_data_ptr<double>());
  const ContrastGatherTable& gather = FASTKD_CHOOSE(contrast_gather);
  for_each_query(q, n, torch::stable::contiguous(index),
                 [&](int64_t i, const Gathered& rows, const float* row, float* sum) {
                   losses[i] = float(gather.nce(rows, row, how, with_direction ? sum : nullptr));
                   for (int64_t d = 0; with_direction && d < width; ++d) directions[i * width + d] = sum[d] * how.scale;
                 });
  return {loss, direction};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_gathered(const Tensor& query, const Tensor& positive,
                                                             const Tensor& bank, const Tensor& index,
                                                             const std::optional<Tensor>& query_ids,
                                                             const std::optional<Tensor>& bank_ids,
                                                             double inverse_temperature, bool with_direction) {
  const int64_t count = query.size(0), width = query.size(1);
  Tensor loss = torch::stable::new_empty(query, {count}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(query, {count}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(query, {count}, ScalarType::Float);
  Tensor direction = torch::stable::new_empty(query, {with_direction ? count : 0, width}, ScalarType::Float);
  float *losses = loss.mutable_data_ptr<float>(), *weights = weight.mutable_data_ptr<float>(),
        *lses = lse.mutable_data_ptr<float>();
  float* directions = direction.mutable_data_ptr<float>();
  const ScoreOptions how = options(inverse_temperature, 0);
  const ContrastTable& table = FASTKD_CHOOSE(contrast);
  const ContrastGatherTable& gather = FASTKD_CHOOSE(contrast_gather);
  for_each_query(query, bank, index, [&](int64_t i, Gathered rows, const float* row, float* sum) {
    if (bank_ids) rows.ids = bank_ids->const_data_ptr<int64_t>(), rows.own = query_ids->const_data_ptr<int64_t>()[i];
    float largest;
    const double mass = gather.softmax(rows, row, how, &largest, with_direction ? sum : nullptr);
    float_row(table, positive, i, rows.scratch);
    finish_row(row, rows.scratch, width, inverse_temperature, largest, mass, sum,
               {losses + i, weights + i, lses + i, with_direction ? directions + i * width : nullptr});
  });
  return {loss, direction, weight, lse};
}

}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("nce_fwd", TORCH_BOX(&fastkd::nce_fwd)); }
