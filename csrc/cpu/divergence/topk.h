// One row against a sparse teacher: the student's softmax is over the whole vocabulary; everything else happens on k +
// 1 numbers, in double. The gradient of a token is (q h - q mean) / T; that of the rest is divided among its tokens in
// proportion to their probability. q h is bounded where h, which may hold p / q, is not. Near p = q, h (which is known
// up to a constant only) is small, and the logarithms are kept with the digits to tell.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu/divergence/op.h"
#include "cpu/runtime/tensors.h"

namespace fastkd::divergence {
namespace {

// T logsumexp(s / T) of all tokens and of the rest, and the mean of h under q, each as the sum of two floats; and
// q (h - mean) of the rest.
struct TopKStats {
  float log_sum, log_sum_low, rest_log_sum, rest_log_sum_low, mean, mean_low, rest_grad;
};
// One token, or the rest: its contribution to the row and q h. Without a tail p and q differ in mass, so the terms are
// plain; with one they are Bregman's, which are never negative.
struct TokenTerm {
  double value, weighted;
};

inline double kl_term(double a, double log_a, double log_b, bool same_mass) {
  if (a == 0) return same_mass ? std::exp(log_b) : 0;
  const double d = log_b - log_a;
  return same_mass ? a * (std::expm1(d) - d) : -a * d;
}

inline TokenTerm token_term(int kind, double log_p, double log_q, double mix, bool same_mass) {
  const double p = std::exp(log_p), q = std::exp(log_q);
  const double m = p + mix * (q - p), log_m = std::log(m);
  switch (kind) {
    case kReverseKL:
      return {kl_term(q, log_q, log_p, same_mass), q > 0 ? q * (log_q - log_p) : 0};
    case kSkewKL:
      return {kl_term(p, log_p, log_m, same_mass), m > 0 ? mix * mix * (q - p) * (q / m) : 0};
    case kJSD:
      return {(1 - mix) * kl_term(p, log_p, log_m, same_mass) + mix * kl_term(q, log_q, log_m, same_mass),
              q > 0 ? mix * q * (log_q - log_m) : 0};
    case kTVD:
      return {std::fabs(q - p) / 2, q > p ? 0.5 * q : (q < p ? -0.5 * q : 0)};
    case kSoftCE:
      return {p > 0 ? -p * log_q : 0, q - p};
    default:
      return {kl_term(p, log_p, log_q, same_mass), q - p};
  }
}

// k tokens per row with log-probabilities, and perhaps the log-mass of the rest as one more token; then they sum to 1.
struct TopKTeacher {
  Tensor indices, log_probs, tail;
  int64_t k;
  bool has_tail;

  TopKTeacher(const Tensor& ids, const Tensor& probs, const std::optional<Tensor>& rest, int64_t columns)
      : indices(torch::stable::contiguous(ids)),
        log_probs(torch::stable::contiguous(probs)),
        k(ids.size(1)),
        has_tail(rest.has_value()) {
    if (has_tail) tail = torch::stable::contiguous(*rest);
    const int64_t* index = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.size(0) * k; ++i)
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < columns, "teacher.indices: expected token ids in [0, ", columns,
                      "), got ", index[i]);
  }
  const int64_t* index(int64_t i) const { return indices.const_data_ptr<int64_t>() + i * k; }
  const double* log_prob(int64_t i) const { return log_probs.const_data_ptr<double>() + i * k; }
  double log_rest(int64_t i) const {
    return has_tail ? tail.const_data_ptr<double>()[i] : -std::numeric_limits<double>::infinity();
  }
};

inline void check_sparse(const Check& check, const Tensor& indices, const std::optional<Tensor>& log_probs,
                         const std::optional<Tensor>& tail, int64_t rows, int64_t kind) {
  check("indices", indices, kI64, "[N, k]", {rows, kAny});
  check.that(log_probs.has_value(), "log_probs", "float64 [N, k]", "None");
  check("log_probs", log_probs, kF64, "[N, k]", {rows, indices.size(1)});
  check("tail", tail, kF64, "[N]", {rows});
  check.that(kind != kMSE, "kind", "one that compares probabilities, 0 to 5", kind);
}

// log sum e^(s / T); -inf where every logit is -inf.
inline double log_sum_exp(const Table& table, const float* s, int64_t columns, double inverse_temperature) {
  const float max = table.largest(s, columns);
  if (max == -std::numeric_limits<float>::infinity()) return max;
  return max * inverse_temperature + std::log(table.sum_of_exponentials(s, columns, inverse_temperature, max));
}

// `rest` is scratch for a row.
inline float topk_forward(const Table& table, const TopKTeacher& teacher, int64_t i, const float* s, int64_t columns,
                          float* rest, int kind, double inverse_temperature, double mix, TopKStats* stats) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const int64_t* index = teacher.index(i);
  std::memcpy(rest, s, columns * sizeof(float));
  for (int64_t j = 0; j < teacher.k; ++j) rest[index[j]] = float(kNothing);
  const double log_rest = log_sum_exp(table, rest, columns, inverse_temperature);
  double top = log_rest;
  for (int64_t j = 0; j < teacher.k; ++j) top = std::fmax(top, s[index[j]] * inverse_temperature);
  double sum = log_rest == kNothing ? 0 : std::exp(log_rest - top);
  for (int64_t j = 0; j < teacher.k; ++j) sum += std::exp(s[index[j]] * inverse_temperature - top);
  const double log_sum = top + std::log(sum), log_rest_q = log_rest - log_sum;
  // Where the student gives the tokens of the rest no probability at all, the rest is left out of the comparison.
  const double log_tail = log_rest == kNothing ? kNothing : teacher.log_rest(i);
  const TokenTerm rest_term = token_term(kind, log_tail, log_rest_q, mix, teacher.has_tail);
  double value = rest_term.value, mean = rest_term.weighted;
  for (int64_t j = 0; j < teacher.k; ++j) {
    const double log_q = s[index[j]] * inverse_temperature - log_sum;
    const TokenTerm x = token_term(kind, teacher.log_prob(i)[j], log_q, mix, teacher.has_tail);
    value += x.value;
    mean += x.weighted;
  }
  const double raw = log_sum / inverse_temperature;
  const double rest_raw = (log_rest == kNothing ? log_sum : log_rest) / inverse_temperature;
  const double rest_grad = rest_term.weighted - std::exp(log_rest_q) * mean;
  const auto low_part = [](double x) { return float(x - float(x)); };
  *stats = {float(raw),  low_part(raw),  float(rest_raw), low_part(rest_raw),
            float(mean), low_part(mean), float(rest_grad)};
  return float(value);
}

inline void topk_backward(const Table& table, const TopKTeacher& teacher, int64_t i, const float* s, int64_t columns,
                          int kind, double inverse_temperature, double mix, const TopKStats& stats, float upstream,
                          float* grad) {
  const double scale = upstream * inverse_temperature;
  const double log_sum = double(stats.log_sum) + stats.log_sum_low, mean = double(stats.mean) + stats.mean_low;
  table.scaled_softmax(s, columns, float(inverse_temperature), stats.rest_log_sum, stats.rest_log_sum_low,
                       float(stats.rest_grad * scale), grad);
  for (int64_t j = 0; j < teacher.k; ++j) {
    const int64_t v = teacher.index(i)[j];
    const double log_q = (s[v] - log_sum) * inverse_temperature;
    const TokenTerm x = token_term(kind, teacher.log_prob(i)[j], log_q, mix, teacher.has_tail);
    grad[v] = float((x.weighted - std::exp(log_q) * mean) * scale);
  }
}

}  // namespace
}  // namespace fastkd::divergence
