// Every schema, once. Implementations register themselves beside their kernels: csrc/cpu/<stem>.cpp,
// csrc/cuda/<stem>.cu.
#include <torch/csrc/stable/library.h>

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

  // kind: position in fastkd.checks.KINDS. mix: weight of the student in the mixture of skew_kl and jsd.
  m.def("divergence_fwd(Tensor s, Tensor t, Tensor? mask, int kind, float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_bwd(Tensor grad, Tensor s, Tensor t, Tensor? mask, Tensor stats, int kind, float temperature, "
      "float mix) -> Tensor");
  // A sparse teacher; tail is the log-mass of the rest.
  m.def(
      "divergence_topk_fwd(Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, int kind, "
      "float temperature, float mix) -> (Tensor, Tensor)");
  m.def(
      "divergence_topk_bwd(Tensor grad, Tensor s, Tensor indices, Tensor log_probs, Tensor? tail, Tensor? mask, "
      "Tensor stats, int kind, float temperature, float mix) -> Tensor");
  // alpha * a [M, K] x b [N, K]^T + start [M, N], in float32: the shared CPU tile by itself, for tests and the bench.
  m.def("gemm_nt(Tensor a, Tensor b, Tensor? start=None, float alpha=1.0, int how=0) -> Tensor");

  // The mean squared difference of every student layer from every teacher layer, [N, M].
  m.def("layer_cost_fwd(Tensor[] students, Tensor[] teachers, Tensor? mask, float? clamp) -> Tensor");
  m.def("layer_cost_bwd(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor? mask, float? clamp) -> Tensor[]");

  // index [B, K'] or all of the bank; ids [B] and [K]: equal ones are dropped. Loss rows [B]; the gradient of the query
  // times the temperature [B, D] (no rows unless asked for); the weight of the positive [B].
  m.def(
      "info_nce_fwd(Tensor query, Tensor positive, Tensor bank, Tensor? index, Tensor inverse_temperature, "
      "Tensor? query_ids, Tensor? bank_ids, bool with_direction) -> (Tensor, Tensor, Tensor)");
  // The positive in column 0 of index; shift is what is taken off every score. Rows [B] and the gradient of the query.
  m.def(
      "nce_fwd(Tensor query, Tensor bank, Tensor index, Tensor shift, float temperature, bool with_direction) -> "
      "(Tensor, Tensor)");
  // 1 - rho and whether it counts, per sequence or (`sequence`) per position, and what the student's gradient is for
  // upstream 1 (no rows of it unless with_gradient).
  m.def(
      "gram_fwd(Tensor s, Tensor t, Tensor? mask, bool sequence, bool normalize, float eps, bool with_gradient) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("gram_bwd(Tensor grad, Tensor unit, bool sequence) -> Tensor");

  // KL(teacher || student) per query [B, H, L] of x yᵀ (x xᵀ without y); [B, H, 4, L] numbers for the backward, and the
  // gradients of xs and ys for upstream 1 (no rows of them unless in_forward).
  m.def(
      "relation_fwd(Tensor xs, Tensor? ys, Tensor xt, Tensor? yt, Tensor? mask, bool causal, float scale_s, "
      "float scale_t, bool in_forward) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "relation_bwd(Tensor grad, Tensor xs, Tensor? ys, Tensor xt, Tensor? yt, Tensor? mask, Tensor stats, "
      "Tensor unit_x, Tensor unit_y, bool causal, float scale_s, float scale_t) -> (Tensor, Tensor)");
}
