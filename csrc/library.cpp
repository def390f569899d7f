// Every schema, once. Implementations register themselves beside their kernels: csrc/cpu/<stem>.cpp,
// csrc/cuda/<stem>.cu.
#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(fastkd, m) {
  // The sum of each row: the smallest op that walks the whole path from Python to a vector unit and back.
  m.def("probe(Tensor x) -> Tensor");

  // cost [P, N, M], a [P, N], b [P, M], a flow [P, N, M] and potentials of the columns [P, M] to
  // start from -> flow, u, v (float64), status.
  m.def(
      "transport(Tensor cost, Tensor a, Tensor b, Tensor? start_flow, Tensor? start_v) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // The same through the 32 lanes of the CUDA kernel, on the CPU; for tests.
  m.def(
      "transport_emulated(Tensor cost, Tensor a, Tensor b, Tensor? start_flow, Tensor? start_v) -> (Tensor, Tensor, "
      "Tensor, Tensor)");

  // Kinds of cost [P, N, M] between N and M layers of weights a [P, N], b [P, M]: their transport as above, and in the
  // same launch the weights that follow from it (float64).
  for (const char* name : {"cost_attention", "cost_attention_emulated"})
    m.def((std::string(name) +
           "(Tensor cost, Tensor a, Tensor b, bool inverse_cost, float temperature, bool product_of_sums, bool joint, "
           "bool double_softmax) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
              .c_str());

  // kind: position in fastkd.checks.KINDS. mix: weight of the student in the mixture of skew_kl and jsd.
  m.def("divergence_fwd(Tensor s, Tensor t, Tensor? mask, int kind, float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_bwd(Tensor grad, Tensor s, Tensor t, Tensor? mask, Tensor stats, int kind, float temperature, "
      "float mix) -> Tensor");
  // Rows [N] and at once the gradient of s for the upstream that is likely: factor, or factor / N (`mean`); then, for
  // the upstream that came, what is left to do to it.
  m.def(
      "divergence_fwd_grad(Tensor s, Tensor t, Tensor? mask, int kind, float temperature, float mix, bool mean, "
      "float factor) -> (Tensor, Tensor)");
  m.def("divergence_settle(Tensor(a!) grad, Tensor upstream, Tensor? mask, bool mean, float factor) -> ()");
  // A sparse teacher; tail is the log-mass of the rest.
  m.def(
      "divergence_topk_fwd(Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, int kind, "
      "float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_topk_bwd(Tensor grad, Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, "
      "Tensor stats, int kind, float temperature, float mix) -> Tensor");
  // The same from hidden [N, D] and head [V, D] of both sides (of the sparse teacher: indices, log_probs, tail), times
  // `factor`, plus `hard` times the cross-entropy with `labels`. scale and cap (0: none) shape the logits. Rows [N, 1];
  // gradients (without rows unless asked for) of sum weights * rows (speed) or sum grad * rows (bwd): in float32, but
  // the head's in its own dtype (speed: in float32 where that is float16, which is not scaled yet).
#define FASTKD_LINEAR_ARGUMENTS                                                                                   \
  "Tensor hidden, Tensor head, Tensor? bias, Tensor? t_hidden, Tensor? t_head, Tensor? t_bias, Tensor? indices, " \
  "Tensor? log_probs, Tensor? tail, Tensor? mask, Tensor? labels, int kind, float temperature, float mix, "       \
  "float factor, float hard, float scale, float cap, float t_scale, float t_cap"
  m.def("linear_divergence_speed(Tensor weights, " FASTKD_LINEAR_ARGUMENTS
        ", bool to_hidden, bool to_head, bool to_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_divergence_fwd(" FASTKD_LINEAR_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("linear_divergence_bwd(Tensor grad, Tensor stats, " FASTKD_LINEAR_ARGUMENTS
        ", bool to_hidden, bool to_head, bool to_bias) -> (Tensor, Tensor, Tensor)");
  // x * factor in the dtype of `like`, or in place.
  m.def("linear_divergence_scale(Tensor x, Tensor factor, Tensor like) -> Tensor");
  m.def("linear_divergence_settle(Tensor(a!) x, Tensor factor) -> ()");

  // alpha * a [M, K] x b [N, K]^T + start [M, N], in float32: the shared CPU tile by itself, for tests and the bench.
  m.def("gemm_nt(Tensor a, Tensor b, Tensor? start=None, float alpha=1.0, int how=0) -> Tensor");

  // The mean squared difference of every student layer from every teacher layer, [N, M].
  m.def("layer_cost_fwd(Tensor[] students, Tensor[] teachers, Tensor? mask, float? clamp) -> Tensor");
  m.def("layer_cost_bwd(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor? mask, float? clamp) -> Tensor[]");
  // The same between the scores q k^T * scale of lists of [B, H, S, d], a scale for each student, then each teacher;
  // the gradients of all queries, then of all keys.
  m.def(
      "attention_cost_fwd(Tensor[] sq, Tensor[] sk, Tensor[] tq, Tensor[] tk, float[] scales, Tensor? mask, bool "
      "causal) -> Tensor");
  m.def(
      "attention_cost_bwd(Tensor grad, Tensor[] sq, Tensor[] sk, Tensor[] tq, Tensor[] tk, float[] scales, Tensor? "
      "mask, bool causal) -> Tensor[]");

  // index [B, K'] or all of the bank; ids [B] and [K]: equal ones are dropped; scale [K] of the rows. Loss rows [B];
  // the gradient of the query times the temperature [B, D] (no rows unless asked for); the weight of the positive [B];
  // log sum e^score of the negatives [B].
  m.def(
      "info_nce_fwd(Tensor query, Tensor positive, Tensor bank, Tensor? index, Tensor inverse_temperature, "
      "Tensor? query_ids, Tensor? bank_ids, bool with_direction, Tensor? scale=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_bank_bwd(Tensor query, Tensor bank, Tensor inverse_temperature, Tensor? query_ids, Tensor? bank_ids, "
      "Tensor lse, Tensor coefficient) -> Tensor");
  // The positive in column 0 of index; shift is what is taken off every score. Rows [B] and the gradient of the query.
  m.def(
      "nce_fwd(Tensor query, Tensor bank, Tensor index, Tensor shift, float temperature, bool with_direction, "
      "Tensor? scale=None) -> (Tensor, Tensor)");
  // Both anchors at once: half the sum of their rows [B], the gradients of both queries, z of both from now on.
  m.def(
      "nce_pair(Tensor query_a, Tensor query_b, Tensor bank_a, Tensor bank_b, Tensor index, Tensor z_a, Tensor z_b, "
      "float noise, float temperature, int n_data) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x W^T + bias on the unit sphere [B, D], and the lengths that it had [B]; then the gradients of x (no rows of it
  // unless with_x), W and bias.
  m.def("unit_linear_fwd(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  m.def(
      "unit_linear_bwd(Tensor grad, Tensor unit, Tensor length, Tensor x, Tensor weight, bool with_x) -> "
      "(Tensor, Tensor, Tensor)");
  // Negatives of other labels (class-sorted ids in order and bounds), or within a window, or all others: [B, count].
  m.def(
      "sample_negatives(Tensor index, int count, int n_data, Tensor? labels, Tensor? order, Tensor? bounds, "
      "Tensor state, bool replacement, int window) -> Tensor");
  // scale [K]: of a float8 bank's rows, which it moves with.
  m.def("update_bank(Tensor(a!) bank, Tensor index, Tensor rows, float momentum, Tensor(b!)? scale=None) -> ()");
  // z if it is set, else n_data times the mean of e^score of this batch.
  m.def(
      "nce_partition(Tensor query, Tensor bank, Tensor index, Tensor z, float temperature, int n_data, "
      "Tensor? scale=None) -> Tensor");
  // Terms are pair 0 level 0, pair 0 level 1, pair 1 level 0, ...; levels: 0 token, 1 sequence by position, 2 sequence
  // in the released code's groups. 1 - rho and whether it counts, [G] or (row) [G, R], and what the backward wants.
  m.def(
      "gram_fwd(Tensor[] students, Tensor[] teachers, Tensor? mask, int[] levels, bool row, bool normalize, float eps, "
      "bool with_gradient) -> (Tensor[], Tensor[], Tensor[])");
  m.def(
      "gram_bwd(Tensor[] grads, Tensor[] students, Tensor[] teachers, Tensor? mask, Tensor[] saved, int[] levels, "
      "bool row, bool normalize, float eps) -> Tensor[]");
  // At once the students' gradients, for the upstream that is likely: a level's weight, or (`mean`) that over the
  // number of values that count; then, for the upstream that came, what is left to do to them.
  m.def(
      "gram_fwd_grad(Tensor[] students, Tensor[] teachers, Tensor? mask, int[] levels, bool row, bool normalize, "
      "float eps, float[] weights, bool mean) -> (Tensor[], Tensor[], Tensor[])");
  m.def(
      "gram_settle(Tensor(a!)[] found, Tensor[] grads, Tensor[] valid, Tensor[] students, Tensor[] teachers, "
      "Tensor? mask, int[] levels, bool row, bool normalize, float eps, float[] weights, bool mean) -> ()");

  // KL(teacher || student) per query [B, H, L] of x yᵀ (x xᵀ without y); [B, H, 4, L] numbers for the backward, and the
  // gradients of xs and ys for upstream 1 (no rows of them unless in_forward).
  m.def(
      "relation_fwd(Tensor xs, Tensor? ys, Tensor xt, Tensor? yt, Tensor? mask, bool causal, float scale_s, "
      "float scale_t, bool in_forward) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "relation_bwd(Tensor grad, Tensor xs, Tensor? ys, Tensor xt, Tensor? yt, Tensor? mask, Tensor stats, "
      "Tensor unit_x, Tensor unit_y, bool causal, float scale_s, float scale_t) -> (Tensor, Tensor)");
}
