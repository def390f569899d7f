// What both forms of InfoNCE, the shared bank and the gathered rows, do once per query.
#pragma once
#include <cmath>
#include <vector>

#include "cpu/contrast/op.h"
#include "cpu/runtime/scratch.h"

namespace fastkd::contrast {

inline int64_t padded_width(int64_t width) { return (width + kColumnStep - 1) / kColumnStep * kColumnStep; }

// Of a bank, which may also be float8.
inline int element_of_bank(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float8_e4m3fn ? kFloat8 : element_of(x);
}

// Row i of x [N, D] times `scale` as floats, with zeros up to the padded width.
inline void float_row(const Table& table, const Tensor& x, int64_t i, float* out, float scale = 1) {
  const char* row = static_cast<const char*>(x.const_data_ptr()) + i * x.stride(0) * int64_t(x.element_size());
  table.to_float32(row, element_of_bank(x), x.size(1), padded_width(x.size(1)), scale, out);
}

inline const float* scales_of(const std::optional<Tensor>& scale) {
  return scale ? scale->const_data_ptr<float>() : nullptr;
}

inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// query [B, D] and bank [K, D]; a float8 bank has a scale [K].
inline void check_bank(const Check& check, const Tensor& query, const Tensor& bank, const std::optional<Tensor>& scale,
                       const char* query_name = "query", const char* bank_name = "bank") {
  check(query_name, query, kFloating, "[B, D]", {kAny, kAny});
  check(bank_name, bank, scale ? kFloating | kF8 : kFloating, "[K, D]", {kAny, query.size(1)});
  check("scale", scale, kF32, "[K]", {bank.size(0)});
}

inline void check_ids(const Check& check, const Tensor& query, const Tensor& bank,
                      const std::optional<Tensor>& query_ids, const std::optional<Tensor>& bank_ids) {
  check.together("query_ids, bank_ids", query_ids.has_value(), bank_ids.has_value());
  check("query_ids", query_ids, kI64, "[B]", {query.size(0)});
  check("bank_ids", bank_ids, kI64, "[K]", {bank.size(0)});
}

// InfoNCE of a query, from the log-sum-exp of its negatives (-inf without any) and its positive's score.
struct InfoNceRow {
  double loss, weight;  // softplus(lse - p); its derivative with respect to lse, minus that with respect to p

  InfoNceRow(double lse, double p) {
    const double gap = lse - p, e = std::exp(-std::fabs(gap));
    loss = (gap > 0 ? gap : 0) + std::log1p(e);
    weight = gap > 0 ? 1 / (1 + e) : e / (1 + e);
  }
};

inline double dot(const float* x, const float* y, int64_t width) {
  double sums[4] = {};  // four chains of additions
  int64_t d = 0;
  for (; d + 4 <= width; d += 4)
    for (int j = 0; j < 4; ++j) sums[j] += double(x[d + j]) * double(y[d + j]);
  for (; d < width; ++d) sums[0] += double(x[d]) * double(y[d]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

struct InfoNceOut {
  float *loss, *weight;  // InfoNceRow
  float* lse;
  float* unit_grad;  // weight (mean of the negatives - positive) [D]; null if nobody asked
};

// mean: the weighted sum of the negatives, mass: the sum of their weights e^(score - largest).
inline void finish_row(const float* query, const float* positive, int64_t width, double inverse_temperature,
                       double largest, double mass, const float* mean, const InfoNceOut& out) {
  const double lse = largest + std::log(mass);
  const InfoNceRow row(lse, dot(query, positive, width) * inverse_temperature);
  const double weight = row.weight;
  *out.loss = float(row.loss);
  *out.lse = float(lse);
  *out.weight = float(weight);
  if (!out.unit_grad) return;
  const float of_mean = mass == 0 ? 0.f : float(weight / mass), of_positive = float(weight);
  for (int64_t d = 0; d < width; ++d) out.unit_grad[d] = of_mean * mean[d] - of_positive * positive[d];
}

}  // namespace fastkd::contrast
