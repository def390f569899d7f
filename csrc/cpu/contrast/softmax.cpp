// InfoNCE where the library makes the products and all scores of a chunk are in memory; this is what lies between them.
// fastkd/ops/contrast_library.py calls it.
//
//     n = query bank^T / T without the query's own id,  lse = log sum_k e^n_k,  loss = softplus(lse - p),
//     w = sigmoid(lse - p),  scores <- w e^(n - lse) = d loss / d n.
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/contrast/op.h"
#include "cpu/contrast/rows.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {
namespace {

std::tuple<Tensor, Tensor> info_nce_softmax(Tensor& scores, const Tensor& query, const Tensor& positive,
                                            const Tensor& inverse_temperature, std::optional<Tensor> query_ids,
                                            std::optional<Tensor> bank_ids) {
  const Check check("info_nce_softmax");
  check("scores", scores, kF32, "[B, K]", {kAny, kAny});
  check("query", query, kFloating, "[B, D]", {scores.size(0), kAny});
  check("positive", positive, kFloating, "[B, D]", {query.size(0), query.size(1)});
  check("inverse_temperature", inverse_temperature, kF64, "[]", {});
  check.together("query_ids, bank_ids", query_ids.has_value(), bank_ids.has_value());
  check("query_ids", query_ids, kI64, "[B]", {scores.size(0)});
  check("bank_ids", bank_ids, kI64, "[K]", {scores.size(1)});
  const int64_t queries = scores.size(0), keys = scores.size(1), width = query.size(1), padded = padded_width(width);
  check.contiguous("scores", scores);
  const Table& table = chosen_table();
  const Tensor q = with_contiguous_rows(query), p = with_contiguous_rows(positive);
  if (query_ids) query_ids = torch::stable::contiguous(*query_ids);
  if (bank_ids) bank_ids = torch::stable::contiguous(*bank_ids);
  const int64_t* own = query_ids ? query_ids->const_data_ptr<int64_t>() : nullptr;
  const int64_t* ids = bank_ids ? bank_ids->const_data_ptr<int64_t>() : nullptr;
  const double inverse = *inverse_temperature.const_data_ptr<double>();
  Tensor loss = torch::stable::new_empty(scores, {queries}), weight = torch::stable::new_empty(scores, {queries});
  float *x = scores.mutable_data_ptr<float>(), *losses = loss.mutable_data_ptr<float>();
  float* weights = weight.mutable_data_ptr<float>();
  parallel_for(0, queries, grain(keys * 8 + padded), [&](int64_t i, int64_t end) {
    std::vector<float> rows(2 * padded);
    for (; i < end; ++i) {
      float* row = x + i * keys;
      float largest = 0;
      const double mass = table.exponentials(row, keys, float(inverse), ids, own ? own[i] : 0, &largest);
      float_row(table, q, i, rows.data());
      float_row(table, p, i, rows.data() + padded);
      const InfoNceRow found(largest + std::log(mass), dot(rows.data(), rows.data() + padded, width) * inverse);
      losses[i] = float(found.loss), weights[i] = float(found.weight);
      if (mass != 0) table.scale_row(row, keys, float(found.weight / mass));
    }
  });
  return {loss, weight};
}

}  // namespace
}  // namespace fastkd::contrast

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("info_nce_softmax", TORCH_BOX(&fastkd::contrast::info_nce_softmax));
}
