// What a row whose tokens are spread over ranks needs besides the ops of whole rows.
//
// divergence_shard_terms    a shard's part of the value and of the mean of h, from the statistics of the whole row.
// divergence_log_sum_exp    of a shard's logits, in double.
#include "cpu/divergence/topk.h"

#include "cpu/simd/isa.h"

namespace fastkd::divergence {
namespace {

Tensor divergence_shard_terms(const Tensor& student, const Tensor& teacher, const Tensor& stats, int64_t kind,
                              double temperature, double mix) {
  const Check check("divergence_shard_terms");
  const int64_t rows = student.dim() == 2 ? student.size(0) : kAny;
  check("s", student, kF32, "[N, V]", {kAny, kAny});
  check("t", teacher, kF32, "[N, V]", {rows, student.size(1)});
  check("stats", stats, kF32, "[N, 7]", {rows, int64_t(sizeof(RowStats) / sizeof(float))});
  check.that(kind >= 0 && kind <= kTVD, "kind", "0 to 4", kind);
  const Tensor s = dense(student), t = dense(teacher), of_rows = dense(stats);
  const int64_t columns = s.size(1);
  const float *from_s = s.const_data_ptr<float>(), *from_t = t.const_data_ptr<float>();
  const auto* stat = reinterpret_cast<const RowStats*>(of_rows.const_data_ptr<float>());
  const Options options = {int(kind), float(1 / temperature), float(mix), float(1 - mix)};
  Tensor terms = torch::stable::new_empty(s, {rows, 3}, ScalarType::Double);
  double* out = terms.mutable_data_ptr<double>();
  const Table& table = chosen_table();
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowSums sums;
      table.refine_part(from_s + i * columns, from_t + i * columns, columns, options, stat[i], &sums);
      out[3 * i] = sums.value, out[3 * i + 1] = sums.sum_q, out[3 * i + 2] = sums.mean_h;
    }
  });
  return terms;
}

Tensor divergence_log_sum_exp(const Tensor& x, double temperature) {
  const Check check("divergence_log_sum_exp");
  check("x", x, kF32, "[N, V]", {kAny, kAny});
  check.that(temperature > 0, "temperature", "a positive number", temperature);
  const Tensor logits = dense(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  const float* from = logits.const_data_ptr<float>();
  Tensor sums = torch::stable::new_empty(x, {rows}, ScalarType::Double);
  double* out = sums.mutable_data_ptr<double>();
  const Table& table = chosen_table();
  parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = log_sum_exp(table, from + i * columns, columns, 1 / temperature);
  });
  return sums;
}

}  // namespace
}  // namespace fastkd::divergence

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // [N, 3]: the sums over these tokens of the value's terms, of q and of q (h - centre), given the statistics of the
  // whole row (divergence/op.h), a part of whose tokens these are.
  m.def("divergence_shard_terms(Tensor s, Tensor t, Tensor stats, int kind, float temperature, float mix) -> Tensor");
  // [N]: log sum e^(x / temperature), -inf where there is none.
  m.def("divergence_log_sum_exp(Tensor x, float temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_shard_terms", TORCH_BOX(&fastkd::divergence::divergence_shard_terms));
  m.impl("divergence_log_sum_exp", TORCH_BOX(&fastkd::divergence::divergence_log_sum_exp));
}
