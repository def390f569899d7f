// A sparse teacher: k words with log-probabilities per row, and perhaps the log-mass of the rest as one more word.
//
// The student's softmax is over the whole vocabulary; everything else happens on k + 1 numbers, in double. The gradient
// is q (h - mean) / T for every word, where h is the rest's outside the k words.
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/divergence.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

FASTKD_DECLARE(DivergenceTable, divergence);

namespace fastkd {
namespace {

struct TopKStats {
  float max, log_sum, mean, rest_slope;  // of s / T; the rest's slope is 0 where the rest has no probability
};
constexpr int64_t kStats = sizeof(TopKStats) / sizeof(float);

// One word, or the rest: its contribution to the row and h. Without a tail p and q differ in mass, so the terms are
// plain; with one they are Bregman's, which are never negative.
struct Word {
  double value, slope;
};

double kl_term(double a, double log_a, double log_b, bool same_mass) {
  if (a == 0) return same_mass ? std::exp(log_b) : 0;
  const double d = log_b - log_a;
  return same_mass ? a * (std::expm1(d) - d) : -a * d;
}

Word word(int kind, double log_p, double log_q, double mix, bool same_mass) {
  const double p = std::exp(log_p), q = std::exp(log_q);
  const double m = p + mix * (q - p), log_m = std::log(m);
  switch (kind) {
    case kReverseKL:
      return {kl_term(q, log_q, log_p, same_mass), q > 0 ? log_q - log_p : 0};
    case kSkewKL:
      return {kl_term(p, log_p, log_m, same_mass), m > 0 ? -mix * p / m : 0};
    case kJSD:
      return {(1 - mix) * kl_term(p, log_p, log_m, same_mass) + mix * kl_term(q, log_q, log_m, same_mass),
              q > 0 ? mix * (log_q - log_m) : 0};
    case kTVD:
      return {std::fabs(q - p) / 2, q > p ? 0.5 : (q < p ? -0.5 : 0)};
    case kSoftCE:
      return {p > 0 ? -p * log_q : 0, q > 0 ? -p / q : 0};
    default:
      return {kl_term(p, log_p, log_q, same_mass), q > 0 ? -p / q : 0};
  }
}

struct Inputs {
  Tensor s, indices, log_probs, tail, mask;
  int64_t rows, columns, k;
  int element;
  bool has_tail, has_mask;

  Inputs(const Tensor& student, const Tensor& ids, const Tensor& probs, const std::optional<Tensor>& rest,
         const std::optional<Tensor>& keep)
      : s(torch::stable::contiguous(student)),
        indices(torch::stable::contiguous(ids)),
        log_probs(torch::stable::contiguous(probs)),
        rows(student.size(0)),
        columns(student.size(1)),
        k(ids.size(1)),
        element(element_of(student)),
        has_tail(rest.has_value()),
        has_mask(keep.has_value()) {
    if (has_tail) tail = torch::stable::contiguous(*rest);
    if (has_mask) mask = torch::stable::contiguous(*keep);
    const int64_t* index = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows * k; ++i)
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < columns, "teacher.indices: an index lies outside the vocabulary");
  }
  bool kept(int64_t i) const { return !has_mask || mask.const_data_ptr<bool>()[i]; }
  const int64_t* index(int64_t i) const { return indices.const_data_ptr<int64_t>() + i * k; }
  const float* log_prob(int64_t i) const { return log_probs.const_data_ptr<float>() + i * k; }
  double log_rest(int64_t i) const {
    return has_tail ? tail.const_data_ptr<float>()[i] : -std::numeric_limits<double>::infinity();
  }
  const float* row(const DivergenceTable& table, int64_t i, std::vector<float>& scratch) const {
    const char* start = static_cast<const char*>(s.const_data_ptr()) + i * columns * int64_t(s.element_size());
    return table.as_floats(start, element, scratch.data(), columns);
  }
};

float forward_row(const DivergenceTable& table, const Inputs& in, int64_t i, const float* s, float* rest, int kind,
                  double inverse_temperature, double mix, TopKStats* stats) {
  const int64_t* index = in.index(i);
  const float max = table.largest(s, in.columns) * float(inverse_temperature);
  std::memcpy(rest, s, in.columns * sizeof(float));
  for (int64_t j = 0; j < in.k; ++j) rest[index[j]] = -std::numeric_limits<float>::infinity();
  const double rest_sum = table.sum_of_exponentials(rest, in.columns, float(inverse_temperature), max);
  double sum = rest_sum;
  for (int64_t j = 0; j < in.k; ++j) sum += std::exp(s[index[j]] * inverse_temperature - max);
  const double log_sum = std::log(sum), log_rest_q = std::log(rest_sum) - log_sum;
  const Word rest_word = word(kind, in.log_rest(i), log_rest_q, mix, in.has_tail);
  double value = rest_word.value, mean = std::exp(log_rest_q) * rest_word.slope;
  for (int64_t j = 0; j < in.k; ++j) {
    const double log_q = s[index[j]] * inverse_temperature - max - log_sum;
    const Word x = word(kind, in.log_prob(i)[j], log_q, mix, in.has_tail);
    value += x.value;
    mean += std::exp(log_q) * x.slope;
  }
  *stats = {max, float(log_sum), float(mean), float(rest_word.slope)};
  return float(value);
}

std::tuple<Tensor, Tensor> divergence_topk_fwd(const Tensor& student, const Tensor& indices, const Tensor& log_probs,
                                               std::optional<Tensor> tail, std::optional<Tensor> mask, int64_t kind,
                                               double temperature, double mix) {
  const Inputs in(student, indices, log_probs, tail, mask);
  Tensor values = torch::stable::new_empty(in.s, {in.rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(in.s, {in.rows, kStats}, ScalarType::Float);
  float* value = values.mutable_data_ptr<float>();
  auto* stat = reinterpret_cast<TopKStats*>(stats.mutable_data_ptr<float>());
  const DivergenceTable& table = FASTKD_CHOOSE(divergence);
  parallel_for(0, in.rows, grain(in.columns), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(in.element == kFloat32 ? 0 : in.columns), rest(in.columns);
    for (int64_t i = begin; i < end; ++i) {
      value[i] = 0;
      stat[i] = {};
      if (in.kept(i))
        value[i] = forward_row(table, in, i, in.row(table, i, scratch), rest.data(), int(kind), 1 / temperature, mix,
                               stat + i);
    }
  });
  return {values, stats};
}

Tensor divergence_topk_bwd(const Tensor& upstream, const Tensor& student, const Tensor& indices,
                           const Tensor& log_probs, std::optional<Tensor> tail, std::optional<Tensor> mask,
                           const Tensor& stats, int64_t kind, double temperature, double mix) {
  const Inputs in(student, indices, log_probs, tail, mask);
  const Tensor g = torch::stable::contiguous(upstream);
  Tensor grad = torch::stable::new_empty(in.s, {in.rows, in.columns});
  use_huge_pages(grad);
  const float* up = g.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const TopKStats*>(stats.const_data_ptr<float>());
  const int64_t width = int64_t(in.s.element_size());
  char* out = static_cast<char*>(grad.mutable_data_ptr());
  const DivergenceTable& table = FASTKD_CHOOSE(divergence);
  parallel_for(0, in.rows, grain(in.columns), [&](int64_t begin, int64_t end) {
    const int64_t half = in.element == kFloat32 ? 0 : in.columns;
    std::vector<float> scratch(half), scratch_out(half);
    for (int64_t i = begin; i < end; ++i) {
      char* row = out + i * in.columns * width;
      if (!in.kept(i)) {
        std::memset(row, 0, in.columns * width);
        continue;
      }
      const float* s = in.row(table, i, scratch);
      float* target = half ? scratch_out.data() : reinterpret_cast<float*>(row);
      const double scale = up[i] / temperature;
      table.scaled_softmax(s, in.columns, float(1 / temperature), stat[i].max + stat[i].log_sum,
                           float((stat[i].rest_slope - stat[i].mean) * scale), target);
      for (int64_t j = 0; j < in.k; ++j) {
        const int64_t v = in.index(i)[j];
        const double log_q = s[v] / temperature - stat[i].max - stat[i].log_sum;
        const Word x = word(int(kind), in.log_prob(i)[j], log_q, mix, in.has_tail);
        target[v] = float(std::exp(log_q) * (x.slope - stat[i].mean) * scale);
      }
      if (half) table.narrow(target, in.element, row, in.columns);
    }
  });
  return grad;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_topk_fwd", TORCH_BOX(&fastkd::divergence_topk_fwd));
  m.impl("divergence_topk_bwd", TORCH_BOX(&fastkd::divergence_topk_bwd));
}
