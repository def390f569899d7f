// KL(p || q) per query, q = softmax(x yᵀ scale) of the student and p that of the teacher over the keys; the matrices
// are never written.
//
// Scores come as tiles [keys][queries] with the queries in the lanes, all keys of a block of queries at a time, so that
// a softmax runs down a column and nothing is summed across lanes. With c = (s - max s) - (t - max t), which is small
// and exact where the sides are close, E = sum e^(t - max t) expm1(c) / sum e^(t - max t) and kappa = log(1 + E):
//
//     KL = sum p (expm1(c) - c) - (E - log(1 + E)):   each term >= 0, nothing cancels as q nears p;
//     q - p = p expm1(c - kappa) = dKL/ds,  W[i, j] = g_i (q - p)[i, j],  dx = scale W y,  dy = scale Wᵀ x.
//
// Of a relation of x with itself dx = scale (W + Wᵀ) x, one product instead of two, and the scores are symmetric, so
// that only half of them are computed.
//
// Up to kMostInCache keys the scores of one (sequence, head) fit in a thread's scratch, and the gradient for upstream 1
// is made in the forward, from the exponentials that are there anyway; the backward scales it where the upstream
// gradient is the same for all queries of a head (any mean or sum), and else starts again with it. Longer ones keep
// four numbers per query, and the backward makes the scores again: of x with itself tile by tile above the diagonal
// (relation/symmetric.h), else a strip of queries at a time. Masked tokens are left out of both queries and keys before
// anything else, so they cost nothing. Every sum is in an order that depends on shapes and the mask only.
#include "cpu/relation/symmetric.h"

#include <numeric>
#include <optional>
#include <tuple>

#include "cpu/simd/isa.h"

namespace fastkd::relation {
namespace {

constexpr int64_t kMostInCache = 512;
constexpr int64_t kBlock = 32;     // queries at a time, at least
constexpr int64_t kFewHeads = 16;  // fewer: the threads share one (sequence, head)
constexpr int64_t kSlices = 8;

Tensor rows_side_by_side(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

struct Args {
  Tensor xs, ys, xt, yt;
  std::optional<Tensor> mask;
  bool with_itself_s, with_itself_t, causal;
  double scale_s, scale_t;

  Args(const Tensor& xs, const std::optional<Tensor>& ys, const Tensor& xt, const std::optional<Tensor>& yt,
       const std::optional<Tensor>& mask, bool causal, double scale_s, double scale_t)
      : xs(rows_side_by_side(xs)),
        ys(ys ? rows_side_by_side(*ys) : this->xs),
        xt(rows_side_by_side(xt)),
        yt(yt ? rows_side_by_side(*yt) : this->xt),
        mask(mask),
        with_itself_s(!ys),
        with_itself_t(!yt),
        causal(causal),
        scale_s(scale_s),
        scale_t(scale_t) {}

  Inputs inputs() const {
    const bool* counts = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    Inputs made = {chosen_table(),
                   chosen_transpose_table(),
                   QueriesAndKeys(xs, ys, with_itself_s, float(scale_s), mask.has_value()),
                   QueriesAndKeys(xt, yt, with_itself_t, float(scale_t), mask.has_value()),
                   counts,
                   mask ? mask->stride(0) : 0,
                   mask ? mask->stride(1) : 0,
                   causal,
                   xs.size(1),
                   xs.size(2),
                   kBlock};
    for (const int64_t rows : {int64_t(made.s.gemm.rows_a), int64_t(made.s.gemm.rows_b), int64_t(made.t.gemm.rows_a),
                               int64_t(made.t.gemm.rows_b), kTransposeLanes})
      made.block = std::lcm(made.block, rows);
    return made;
  }
  int64_t pairs() const { return xs.size(0) * xs.size(1); }
  int64_t work() const { return xs.size(2) * xs.size(2) * (xs.size(3) + xt.size(3)); }
};

// x [B, H, L, d], d of either side its own; y as x.
void check(const Check& check, const Tensor& xs, const std::optional<Tensor>& ys, const Tensor& xt,
           const std::optional<Tensor>& yt, const std::optional<Tensor>& mask) {
  check("xs", xs, kFloating, "[B, H, L, d]", {kAny, kAny, kAny, kAny});
  const int64_t B = xs.size(0), H = xs.size(1), L = xs.size(2);
  check("ys", ys, dtype_of(xs), "[B, H, L, d]", {B, H, L, xs.size(3)});
  check("xt", xt, kFloating, "[B, H, L, d]", {B, H, L, kAny});
  check("yt", yt, dtype_of(xt), "[B, H, L, d]", {B, H, L, xt.size(3)});
  check("mask", mask, kBool, "[B, L]", {B, L});
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

Tensor empty_gradient(const Args& of, bool wanted) {
  const auto type = of.xs.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor made = empty(of.xs, {of.xs.size(0), of.xs.size(1), wanted ? of.xs.size(2) : 0, of.xs.size(3)}, type);
  use_huge_pages(made);
  return made;
}

Outputs out_of(const Tensor& dx, const Tensor& dy) {
  const auto data = [](const Tensor& x) { return x.numel() ? static_cast<char*>(x.mutable_data_ptr()) : nullptr; };
  return {nullptr, nullptr, data(dx), data(dy), int64_t(dx.element_size()), nullptr};
}

// What is to be done for every (sequence, head); the gradient where `out` has room for it.
void run(const Args& of, const Outputs& out, const std::vector<int64_t>& pairs) {
  const Inputs inputs = of.inputs();
  const int64_t count = int64_t(pairs.size());
  if (inputs.length > kMostInCache) {
    const bool share = count < kFewHeads;
    const bool gradient = out.dx != nullptr;
    const int64_t slices = share ? kSlices : 1;
    const auto some = [&](int64_t begin, int64_t end) {
      std::optional<Symmetric> symmetric;
      std::optional<PerStrip> strips;
      if (Symmetric::possible(inputs)) symmetric.emplace(inputs, gradient, slices);
      for (int64_t i = begin; i < end; ++i) {
        if (symmetric && symmetric->run(pairs[i], out)) continue;
        if (!strips) strips.emplace(inputs, gradient, slices);
        strips->run(pairs[i], out);
      }
    };
    return share ? some(0, count) : parallel_for(0, count, 1, some);
  }
  parallel_for(0, count, grain(of.work(), 1 << 20), [&](int64_t begin, int64_t end) {
    InCache work(inputs, out.dx != nullptr);
    for (int64_t i = begin; i < end; ++i) work.run(pairs[i], out);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation_fwd(const Tensor& xs, std::optional<Tensor> ys, const Tensor& xt,
                                                        std::optional<Tensor> yt, std::optional<Tensor> mask,
                                                        bool causal, double scale_s, double scale_t,
                                                        bool gradient_in_forward) {
  check(Check("relation_fwd"), xs, ys, xt, yt, mask);
  const Args of(xs, ys, xt, yt, mask, causal, scale_s, scale_t);
  const int64_t B = xs.size(0), H = xs.size(1), L = xs.size(2);
  STD_TORCH_CHECK(!gradient_in_forward || L <= kMostInCache, "relation_fwd: gradient_in_forward: expected at most ",
                  kMostInCache, " keys, got ", L);
  Tensor values = empty(xs, {B, H, L}, ScalarType::Float);
  Tensor stats = empty(xs, {B, H, 4, L}, ScalarType::Float);
  Tensor dx = empty_gradient(of, gradient_in_forward),
         dy = empty_gradient(of, gradient_in_forward && !of.with_itself_s);
  Outputs out = out_of(dx, dy);
  out.values = values.mutable_data_ptr<float>();
  out.stats = stats.mutable_data_ptr<float>();
  std::vector<int64_t> pairs(values.numel() ? of.pairs() : 0);
  std::iota(pairs.begin(), pairs.end(), 0);
  run(of, out, pairs);
  return {values, stats, dx, dy};
}

// Whether the queries of a (sequence, head) that count all have the same upstream gradient.
bool same_for_all(const float* g, const ValidTokens& valid) {
  for (const int64_t i : valid.tokens)
    if (!(g[i] == g[valid.tokens[0]])) return false;
  return true;
}

std::tuple<Tensor, Tensor> relation_bwd(const Tensor& grad, const Tensor& xs, std::optional<Tensor> ys,
                                        const Tensor& xt, std::optional<Tensor> yt, std::optional<Tensor> mask,
                                        const Tensor& stats, const Tensor& unit_grad_x, const Tensor& unit_grad_y,
                                        bool causal, double scale_s, double scale_t) {
  const Check op("relation_bwd");
  check(op, xs, ys, xt, yt, mask);
  const int64_t B = xs.size(0), H = xs.size(1), made = unit_grad_x.numel() ? xs.size(2) : kAny;
  const unsigned gradient = dtype_of(xs) == kBF16 ? kBF16 : kF32;
  op("grad", grad, kF32, "[B, H, L]", {B, H, xs.size(2)});
  op("stats", stats, kF32, "[B, H, 4, L]", {B, H, 4, xs.size(2)});
  op("unit_grad_x", unit_grad_x, gradient, "[B, H, L, d]", {B, H, made, xs.size(3)});
  op("unit_grad_y", unit_grad_y, gradient, "[B, H, L, d]", {B, H, ys ? made : kAny, xs.size(3)});
  const Tensor of_queries = dense(stats), for_x = dense(unit_grad_x), for_y = dense(unit_grad_y);
  const Args of(xs, ys, xt, yt, mask, causal, scale_s, scale_t);
  const Inputs inputs = of.inputs();
  const Tensor g = torch::stable::contiguous(grad);
  const float* upstream = g.const_data_ptr<float>();
  Tensor dx = empty_gradient(of, true), dy = empty_gradient(of, !of.with_itself_s);
  Outputs out = out_of(dx, dy);
  out.upstream = upstream;
  if (xs.size(2) > kMostInCache)
    out.stats = const_cast<float*>(of_queries.const_data_ptr<float>());  // read only, there
  const int64_t L = inputs.length, size = L * inputs.s.width;
  std::vector<char> scaled(of.pairs(), 0);
  if (unit_grad_x.numel()) {
    const auto scale = [&](const Tensor& unit, char* to, int64_t pair, float by) {
      if (!to) return;
      const int64_t at = pair * size * out.item;
      const auto* from = static_cast<const char*>(unit.const_data_ptr());
      inputs.table.scale(from + at, out.item == 2, by, size, to + at);
    };
    parallel_for(0, of.pairs(), grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const ValidTokens valid = inputs.valid_tokens(pair);
        if (valid.count() && !same_for_all(upstream + pair * L, valid)) continue;
        const float by = valid.count() ? upstream[pair * L + valid.first()] : 0;
        scale(for_x, out.dx, pair, by);
        scale(for_y, out.dy, pair, by);
        scaled[pair] = 1;
      }
    });
  }
  std::vector<int64_t> remaining;
  for (int64_t pair = 0; pair < of.pairs(); ++pair)
    if (!scaled[pair] && size) remaining.push_back(pair);
  run(of, out, remaining);
  return {dx, dy};
}

}  // namespace
}  // namespace fastkd::relation

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // KL(teacher || student) per query [B, H, L] of x yᵀ (x xᵀ without y); [B, H, 4, L] numbers for the backward, and the
  // gradients of xs and ys for upstream 1 (no rows of them unless gradient_in_forward).
  m.def(
      "relation_fwd(Tensor xs, Tensor? ys, Tensor xt, Tensor? yt, Tensor? mask, bool causal, float scale_s, "
      "float scale_t, bool gradient_in_forward) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "relation_bwd(Tensor grad, Tensor xs, Tensor? ys, Tensor xt, Tensor? yt, Tensor? mask, Tensor stats, "
      "Tensor unit_grad_x, Tensor unit_grad_y, bool causal, float scale_s, float scale_t) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_fwd", TORCH_BOX(&fastkd::relation::relation_fwd));
  m.impl("relation_bwd", TORCH_BOX(&fastkd::relation::relation_bwd));
}
