// linear_divergence where the library makes the products: what lies between them, for a chunk of rows whose logits all
// exist. fastkd/ops/linear_divergence_library.py calls it.
#include "cpu/linear_divergence/args.h"

namespace fastkd::linear_divergence {
namespace {

// s, t [N, V]: hidden head^T of either side; the gradient of sum weights * rows by s takes the place of t, which is not
// read if the teacher is sparse. Rows [N, 1], and that of the bias [V, 1].
std::tuple<Tensor, Tensor> linear_divergence_rows(Tensor s, Tensor t, const Tensor& weights, FASTKD_LINEAR_PARAMETERS,
                                                  bool to_bias) {
  const Check check("linear_divergence_rows");
  FASTKD_LINEAR_CHECK(check);
  const int64_t rows = hidden.size(0), tokens = head.size(0);
  check("s", s, kF32, "[N, V]", {rows, tokens});
  check("t", t, kF32, "[N, V]", {rows, tokens});
  check("weights", weights, kF32, "[N]", {rows});
  check.contiguous("s", s);
  check.contiguous("t", t);
  const Args args = FASTKD_LINEAR_ARGS;
  const Tensor w = torch::stable::contiguous(weights);
  Tensor values = zeros(hidden, rows, 1), of_bias = zeros(hidden, to_bias ? tokens : 0, 1);
  float *of_s = s.mutable_data_ptr<float>(), *of_t = t.mutable_data_ptr<float>();
  float* value = values.mutable_data_ptr<float>();
  check.that(!mask, "mask", "None, since all rows count", "a tensor");
  parallel_for(0, rows, grain(tokens), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float *own = of_s + i * tokens, *other = of_t + i * tokens;
      RowStats stats;
      args.finish_logits(args.student, own, 0, tokens);
      if (!args.sparse) args.finish_logits(args.teacher, other, 0, tokens);
      value[i] = args.forward_row(i, own, other, &stats);
      args.differentiate(i, 0, tokens, own, other, stats, w.const_data_ptr<float>()[i]);
    }
  });
  if (to_bias)
    parallel_steps(tokens, kTokens, 0, [&](int64_t v, int64_t end, char*) {
      for (int64_t i = 0; i < rows; ++i)
        args.linear.add_row(of_bias.mutable_data_ptr<float>() + v, of_t + i * tokens + v, end - v);
    });
  return {values, of_bias};
}

}  // namespace
}  // namespace fastkd::linear_divergence

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("linear_divergence_rows", TORCH_BOX(&fastkd::linear_divergence::linear_divergence_rows));
}
