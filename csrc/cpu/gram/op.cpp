// 1 - rho of two self-similarity matrices P (student) and Q (teacher), per group; neither is written anywhere.
//
// P = u uᵀ - mean with u = x / |x|. With c the mean row and v = u - c, the mean of u uᵀ is |c|², and exactly
//
//     P[i, j] = <v_i, v_j> + <c, v_i> + <c, v_j>,
//
// a sum of small numbers only: what all rows have in common, be it 200 times larger than what they have not, never
// meets a rounding. (bfloat16 rows are multiplied as they are instead, since v is not a bfloat16: <x_i, x_j> / |x_i|
// |x_j| - |c|², exact products and float32 sums, no worse than float32 arithmetic on them.)
//
//     rho = <P, Q> / (ab + eps), a = |P|, b = |Q|:   d(1 - rho)/dP = W = -(Q - k P) / den, k = <P, Q> b / (a den)
//     d/du_i = sum_j G[i, j] u_j = sum_j G[i, j] v_j + (sum_j G[i, j]) c,   G = W + Wᵀ
//
// and along the sphere (d/dx is what is orthogonal to u, over |x|) c = u_i - v_i counts as -v_i, small again. Row by
// row (gram/row_stats.h) a, b and the means are those of row i, and so are den and k in W[i, j]. Near a correlation of
// 1 or -1 little is left of Q - k P, so k has the digits of two floats.
//
// But for the upstream factor, W depends on its own group only. The gradient is therefore made in the forward, while
// P and Q are there, for the expected upstream where the caller names one, else for 1: recomputing P and Q would be
// twice the work. A group of at most kMostInCache rows is one thread's, its P and Q (the upper triangle computed) in
// that thread's scratch (gram/in_cache.h); of longer ones the tiles are made again for the gradient, and the threads
// share the group (gram/tiled.h); where there are more rows than features, and more than kFewRows, the Gram of the
// features gives the same sums (gram/features.h). Sums are in an order that depends on shapes only.
#include <tuple>

#include "cpu/gram/features.h"
#include "cpu/gram/in_cache.h"
#include "cpu/gram/levels.h"
#include "cpu/gram/tiled.h"

namespace fastkd::gram {
namespace {

constexpr int64_t kMostInCache = 512;
constexpr int64_t kFewRows = 320;  // up to here, gradients by features are less accurate than eager's near convergence
Tensor rows_side_by_side(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// The released code's groups: all positions are measured before the first gradient is known.
template <class Work, class Each>
void by_official_groups(const Term& term, const Each& each_group) {
  OfficialGroups official(term.length, term.groups);
  each_group([&](Work& work, int64_t group) { work.measure_rows(group, &official.rows[group * term.length]); });
  official.conclude_all(term);
  if (term.out) each_group([&](Work& work, int64_t group) { work.apply_official(group, official); });
}

// Whether z^T z of all features is less work than the Gram matrices: multiplications, and what bfloat16 units save.
bool features_are_fewer(double n, const Tensor& s, const Tensor& t, bool with_gradient) {
  const auto ds = double(s.size(2)), dt = double(t.size(2)), both = ds + dt;
  const bool half = fastkd::gemm(element_of(s)).operand == kBFloat16 && element_of(t) == kBFloat16;
  // Tiles are made twice, the second time without symmetry.
  const double by_rows = n * n * (with_gradient ? 3 * both + 2 * ds : both) * (half ? 0.5 : 1);
  return n > kFewRows && n * (both * both + (with_gradient ? 2 * ds * both : 0)) < by_rows;
}

void correlate(const Term& term) {
  if (term.by_features) {
    Features work(term);
    for (int64_t group = 0; group < term.groups; ++group) work.run(group);
    return;
  }
  if (term.length > kMostInCache) {
    const auto each_group = [&](const auto& f) {
      Tiled work(term);
      for (int64_t group = 0; group < term.groups; ++group) f(work, group);
    };
    if (term.official) return by_official_groups<Tiled>(term, each_group);
    return each_group([](Tiled& work, int64_t group) { work.run(group); });
  }
  const auto each_group = [&](const auto& f) {
    const int64_t least_groups = grain(term.length * term.length * (term.s.width + term.t.width), 1 << 20);
    parallel_for(0, term.groups, least_groups, [&](int64_t begin, int64_t end) {
      InCache work(term);
      for (int64_t group = begin; group < end; ++group) f(work, group);
    });
  };
  if (term.official) return by_official_groups<InCache>(term, each_group);
  each_group([](InCache& work, int64_t group) { work.run(group); });
}

Term term_of(const Args& args, int64_t level, bool with_gradient, const Tensor& s, const Tensor& t, Norms norms[2],
             Tensor& values, Tensor& valid) {
  const Table& table = chosen_table();
  const bool sequence = level != kToken, official = level == kOfficial && !args.row;
  const int64_t groups = s.size(sequence ? 1 : 0), length = s.size(sequence ? 0 : 1);
  const std::vector<int64_t> shape =
      args.row ? std::vector<int64_t>{groups, length} : std::vector<int64_t>{official ? length : groups};
  const bool per_row = args.row || official;
  const bool by_features = !per_row && features_are_fewer(double(length), s, t, with_gradient);
  values = torch::stable::new_empty(s, shape, ScalarType::Float);
  valid = torch::stable::new_empty(s, shape, ScalarType::Bool);
  Term term = {table,
               GroupRows(table, s, sequence, args.normalize, per_row, by_features, norms),
               GroupRows(table, t, sequence, args.normalize, per_row, by_features, norms + 1),
               GroupMask(args.mask, sequence, length),
               groups,
               length,
               sequence,
               args.row,
               official,
               by_features,
               args.eps,
               values.mutable_data_ptr<float>(),
               static_cast<bool*>(valid.mutable_data_ptr()),
               {},
               nullptr,
               0,
               false};
  GroupRows::align_strips(term.s, term.t);
  return term;
}

}  // namespace

void all_levels(const Args& args, const Tensor& student, const Tensor& teacher, GradRequest& request, Tensors* values,
                Tensors* valid) {
  const Tensor s = rows_side_by_side(student), t = rows_side_by_side(teacher);
  Norms norms[2];
  for (size_t k = 0; k < args.levels.size(); ++k) {
    Tensor one_minus_rho, counts;
    Term term = term_of(args, args.levels[k], !request.out.empty(), s, t, norms, one_minus_rho, counts);
    if (!request.out.empty()) {
      const bool together = request.out.size() == 1;
      Tensor& out = request.out[together ? 0 : k];
      term.upstream = request.upstream[k];
      term.out = static_cast<char*>(out.mutable_data_ptr());
      term.out_item = int64_t(out.element_size());
      term.add = together && k > 0;
    }
    correlate(term);
    // With a mask, a level has seen the rows of its own groups only.
    norms[0].known = norms[1].known = args.normalize && !args.mask;
    if (values) values->push_back(one_minus_rho);
    if (valid) valid->push_back(counts);
  }
}

Tensor gradient_like(const Tensor& student) {
  const bool bfloat16 = student.scalar_type() == ScalarType::BFloat16;
  Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1), student.size(2)},
                                         bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  use_huge_pages(grad);
  return grad;
}

void check_args(const Check& check, const Tensors& students, const Tensors& teachers, const Args& args) {
  check.length("students", students, kAny);
  check.length("teachers", teachers, int64_t(students.size()));
  check.length("levels", args.levels, kAny);
  for (const int64_t level : args.levels) check.that(level >= kToken && level <= kOfficial, "levels", "0 to 2", level);
  check("students", students[0], kFloating, "[B, N, D]", {kAny, kAny, kAny}, 0);
  const int64_t B = students[0].size(0), N = students[0].size(1);
  check("students", students, kFloating, "[B, N, D]", {B, N, kAny});
  check("teachers", teachers, kFloating, "[B, N, D]", {B, N, kAny});
  for (const auto* side : {&students, &teachers})
    for (const Tensor& x : *side) check.that(x.size(2) > 0, "students, teachers", "D > 0", "an empty axis");
  check("mask", args.mask, kBool, "[B, N]", {B, N});
}

void check_terms(const Check& check, const char* name, const Tensors& xs, unsigned dtype, const Tensors& students,
                 const Args& args) {
  const size_t terms = args.levels.size();
  const int64_t B = students[0].size(0), N = students[0].size(1);
  check.length(name, xs, int64_t(students.size() * terms));
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t level = args.levels[i % terms];
    if (args.row)
      check(name, xs[i], dtype, "[G, R]", {level == kToken ? B : N, level == kToken ? N : B}, int64_t(i));
    else
      check(name, xs[i], dtype, "[G]", {level == kSequence ? N : B}, int64_t(i));
  }
}

namespace {
// A row's upstream is that of its group at the token and at the sequence level; elsewhere rows have many.
bool unit_gradients_suffice(const Args& args) {
  for (int64_t level : args.levels)
    if (level == kOfficial || args.row) return false;
  return true;
}

std::tuple<Tensors, Tensors, Tensors> gram_fwd(Tensors students, Tensors teachers, std::optional<Tensor> mask,
                                               std::vector<int64_t> levels, bool row, bool normalize, double eps,
                                               bool with_gradient) {
  const Args args = {mask, levels, row, normalize, eps};
  check_args(Check("gram_fwd"), students, teachers, args);
  Tensors values, valid, saved;
  for (size_t pair = 0; pair < students.size(); ++pair) {
    GradRequest request = {{}, std::vector<Upstream>(levels.size())};
    for (size_t k = 0; with_gradient && unit_gradients_suffice(args) && k < levels.size(); ++k)
      request.out.push_back(gradient_like(students[pair]));
    all_levels(args, students[pair], teachers[pair], request, &values, &valid);
    saved.insert(saved.end(), request.out.begin(), request.out.end());
  }
  return {values, valid, saved};
}

// What gram_fwd left for gram_bwd: nothing, or a gradient of every term.
void check_saved(const Check& check, Tensors& saved, const Tensors& students, const Args& args) {
  if (saved.empty()) return;
  const size_t terms = args.levels.size();
  check.length("saved", saved, unit_gradients_suffice(args) ? int64_t(students.size() * terms) : 0);
  for (size_t i = 0; i < saved.size(); ++i) {
    const Tensor& student = students[i / terms];
    check.like("saved", saved[i], dtype_of(student) == kBF16 ? kBF16 : kF32, student, int64_t(i));
    saved[i] = dense(saved[i]);
  }
}

// The sum of units, each times its upstream, in the student's dtype.
Tensor weighted(const Tensor& student, const Args& args, const std::vector<Upstream>& upstream, const Tensor* units) {
  const Table& table = chosen_table();
  Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1), student.size(2)});
  use_huge_pages(grad);
  const int64_t positions = student.size(1), width = student.size(2), terms = int64_t(upstream.size());
  const int element_in = element_of(units[0]), element_out = element_of(grad);
  const int64_t row_in = width * int64_t(units[0].element_size()), row_out = width * int64_t(grad.element_size());
  auto* out = static_cast<char*>(grad.mutable_data_ptr());
  parallel_for(0, student.size(0) * positions, grain(width), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(gram_padded(width)), by(terms);
    std::vector<const void*> from(terms);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < terms; ++k) {
        by[k] = upstream[k][args.levels[k] == kToken ? i / positions : i % positions];
        from[k] = static_cast<const char*>(units[k].const_data_ptr()) + i * row_in;
      }
      table.weighted_sum(from.data(), element_in, by.data(), terms, width, sum.data(), element_out, out + i * row_out);
    }
  });
  return grad;
}

}  // namespace

Tensor recompute(const Args& args, const Tensor& student, const Tensor& teacher, std::vector<Upstream> upstream) {
  GradRequest request = {{gradient_like(student)}, std::move(upstream)};
  all_levels(args, student, teacher, request, nullptr, nullptr);
  if (student.scalar_type() != ScalarType::Half) return request.out[0];
  return weighted(student, args, {Upstream()}, request.out.data());
}

std::vector<Upstream> upstream_of(const Tensors& grads, size_t pair, size_t terms) {
  std::vector<Upstream> found(terms);
  for (size_t k = 0; k < terms; ++k) found[k].each = grads[pair * terms + k].const_data_ptr<float>();
  return found;
}

namespace {
Tensors gram_bwd(Tensors grads, Tensors students, Tensors teachers, std::optional<Tensor> mask, Tensors saved,
                 std::vector<int64_t> levels, bool row, bool normalize, double eps) {
  const Args args = {mask, levels, row, normalize, eps};
  const Check check("gram_bwd");
  check_args(check, students, teachers, args);
  check_terms(check, "grads", grads, kF32, students, args);
  check_saved(check, saved, students, args);
  Tensors found;
  const size_t terms = levels.size();
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  for (size_t pair = 0; pair < students.size(); ++pair) {
    const std::vector<Upstream> upstream = upstream_of(grads, pair, terms);
    found.push_back(saved.empty() ? recompute(args, students[pair], teachers[pair], upstream)
                                  : weighted(students[pair], args, upstream, &saved[pair * terms]));
  }
  return found;
}

}  // namespace
}  // namespace fastkd::gram

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // Terms are pair 0 level 0, pair 0 level 1, pair 1 level 0, ...; levels: 0 token, 1 sequence by position, 2 sequence
  // in the released code's groups. 1 - rho and whether it counts, [G] or (row) [G, R], and what the backward wants.
  m.def(
      "gram_fwd(Tensor[] students, Tensor[] teachers, Tensor? mask, int[] levels, bool row, bool normalize, float eps, "
      "bool with_gradient) -> (Tensor[], Tensor[], Tensor[])");
  m.def(
      "gram_bwd(Tensor[] grads, Tensor[] students, Tensor[] teachers, Tensor? mask, Tensor[] saved, int[] levels, "
      "bool row, bool normalize, float eps) -> Tensor[]");
  // Also the students' gradients, for the expected upstream gradient: a level's weight, or (`mean`) that over the
  // number of values that count; then, for the upstream that came, what is left to do to them.
  m.def(
      "gram_fwd_grad(Tensor[] students, Tensor[] teachers, Tensor? mask, int[] levels, bool row, bool normalize, "
      "float eps, float[] weights, bool mean) -> (Tensor[], Tensor[], Tensor[])");
  m.def(
      "gram_rescale_grads(Tensor(a!)[] gradients, Tensor[] grads, Tensor[] valid, Tensor[] students, Tensor[] "
      "teachers, "
      "Tensor? mask, int[] levels, bool row, bool normalize, float eps, float[] weights, bool mean) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("gram_fwd", TORCH_BOX(&fastkd::gram::gram_fwd));
  m.impl("gram_bwd", TORCH_BOX(&fastkd::gram::gram_bwd));
}
