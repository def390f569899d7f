// Mean squared differences between attention scores, from queries and keys: of every head a few rows of all layers'
// scores at a time, in the second cache. No S x S matrix exists; the backward makes the rows again. Of long sequences
// with narrow heads layer_cost/attention_identity.cpp does it from d x d matrices, where that keeps its digits.
//
// A head of a sequence is one unit of work, and the units' sums are added up in their order: the result is the same,
// bit for bit, for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/layer_cost/attention_layers.h"
#include "cpu/layer_cost/space.h"
#include "cpu/simd/isa.h"

namespace fastkd::layer_cost {
namespace {

constexpr int64_t kCacheBytes = 512 << 10;  // for the scores of all layers: half of a second cache
constexpr int64_t kScores = kFloat32;       // scores are floats, whatever the layers are

// Blocks of scores of one head.
class Scores : public AttentionUnit {
 public:
  int64_t padded = 0, block = 0;           // a row's keys in a block, rows of a block
  std::vector<std::vector<float>> scores;  // per layer [block, padded]

  Scores(const AttentionShape& shape, const Layers& layers)
      : AttentionUnit(shape, layers), scores(layers.count()), packed_(layers.count()) {}

  // used: the layers whose scores will be asked for.
  void begin(int64_t unit, const std::vector<bool>& used) {
    AttentionUnit::begin(unit);
    padded = (valid + kLayerPad - 1) / kLayerPad * kLayerPad;
    const int64_t bytes = std::max<int64_t>(int64_t(layers.count()) * padded * int64_t(sizeof(float)), 1);
    block = std::min(shape.queries, std::max<int64_t>(kCacheBytes / bytes, 8));
    for (int l = 0; l < layers.count(); ++l) {
      if (!used[l] || valid == 0) continue;
      scores[l].assign(block * padded, 0.f);  // what pads a row stays 0
      const GemmSource source = keys_of(l);
      const Gemm& product = gemm(source.element);
      packed_[l].resize(product.bytes_b(valid, source.k));
      product.pack_b(source, packed_[l].data());
    }
  }

  void compute(int l, int64_t begin, int64_t rows) {
    const GemmSource source = queries_of(l, begin, rows);
    const Gemm& product = gemm(source.element);
    workspace_.resize(product.bytes_a(rows, source.k));
    product.pack_a(source, workspace_.data());
    float* out = scores[l].data();
    product.tile(workspace_.data(), packed_[l].data(), {rows, valid, source.k}, {out, padded, layers.scale[l], false});
    if (!shape.causal) return;
    for (int64_t r = 0; r < rows; ++r) {
      const auto later = std::upper_bound(position.begin(), position.end(), begin + r) - position.begin();
      std::fill(out + r * padded + later, out + r * padded + valid, 0.f);
    }
  }

 private:
  std::vector<std::vector<char>> packed_;
  std::vector<char> workspace_;
};

// Sums of squared differences, every one of `students` with every one of `teachers`, into sums[i * all teachers + j].
void sums_of_scores(const AttentionShape& shape, const Layers& layers, const std::vector<int>& students,
                    const std::vector<int>& teachers, double* sums) {
  const int n = int(students.size()), m = int(teachers.size());
  const int64_t pairs = int64_t(n) * m;
  const Table& table = chosen_table();
  std::vector<int> chosen = students;
  for (const int j : teachers) chosen.push_back(layers.students + j);
  std::vector<bool> used(layers.count());
  for (const int l : chosen) used[l] = true;
  std::vector<double> partial(shape.units() * pairs);
  parallel_for(0, shape.units(), 1, [&](int64_t first, int64_t last) {
    Scores unit(shape, layers);
    std::vector<const void*> data(chosen.size());
    std::vector<double> lanes(pairs * kLayerSums);
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u, used);
      std::fill(lanes.begin(), lanes.end(), 0.);
      for (int64_t begin = 0; unit.valid && begin < shape.queries; begin += unit.block) {
        const int64_t rows = std::min(unit.block, shape.queries - begin);
        for (size_t c = 0; c < chosen.size(); ++c) {
          unit.compute(chosen[c], begin, rows);
          data[c] = unit.scores[chosen[c]].data();
        }
        table.squared_distances(data.data(), kScores, n, data.data() + n, kScores, m, rows * unit.padded, lanes.data());
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const double* own = lanes.data() + pair * kLayerSums;
        partial[u * pairs + pair] = std::accumulate(own, own + kLayerSums, 0.);
      }
    }
  });
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double& sum = sums[students[pair / m] * layers.teachers + teachers[pair % m]] = 0;
    for (int64_t u = 0; u < shape.units(); ++u) sum += partial[u * pairs + pair];
  }
}

// The identity's sums; those that it cannot vouch for, because a student is near a teacher, from the scores.
void sums_by_identity(const AttentionShape& shape, const Layers& layers, double* sums) {
  const int n = layers.students, m = layers.teachers;
  std::vector<double> error_bounds(n * m);
  identity_sums(shape, layers, sums, error_bounds.data());
  for (int i = 0; i < n; ++i) {
    std::vector<int> inaccurate;
    for (int j = 0; j < m; ++j)
      if (!(error_bounds[i * m + j] <= kTrusted * sums[i * m + j])) inaccurate.push_back(j);  // a NaN is doubtful too
    if (!inaccurate.empty()) sums_of_scores(shape, layers, {i}, inaccurate, sums);
  }
}

// Queries [B, H, S, d] and keys [B, H, S', d] of every layer, d its own.
void check(const Check& check, const std::vector<Tensor>& sq, const std::vector<Tensor>& sk,
           const std::vector<Tensor>& tq, const std::vector<Tensor>& tk, const std::vector<double>& scales,
           const std::optional<Tensor>& mask) {
  check.length("sq", sq, kAny);
  check.length("sk", sk, int64_t(sq.size()));
  check.length("tq", tq, kAny);
  check.length("tk", tk, int64_t(tq.size()));
  check.length("scales", scales, int64_t(sq.size() + tq.size()));
  check("sq", sq[0], kFloating, "[B, H, S, d]", {kAny, kAny, kAny, kAny}, 0);
  check("sk", sk[0], kFloating, "[B, H, S, d]", {kAny, kAny, kAny, kAny}, 0);
  const int64_t B = sq[0].size(0), H = sq[0].size(1), queries = sq[0].size(2), keys = sk[0].size(2);
  const auto layers = [&](const char* q_name, const char* k_name, const std::vector<Tensor>& q,
                          const std::vector<Tensor>& k) {
    check(q_name, q, kFloating, "[B, H, S, d]", {B, H, queries, kAny});
    for (size_t l = 0; l < q.size(); ++l)
      check(k_name, k[l], dtype_of(q[l]), "[B, H, S, d]", {B, H, keys, q[l].size(3)}, int64_t(l));
  };
  layers("sq", "sk", sq, sk);
  layers("tq", "tk", tq, tk);
  check("mask", mask, kBool, "[B, S]", {B, keys});
}

AttentionShape shape_of(const std::vector<Tensor>& sq, const std::vector<Tensor>& sk, const bool* mask, bool causal) {
  return {sq[0].size(0), sq[0].size(1), sq[0].size(2), sk[0].size(2), causal, mask};
}

Tensor attention_cost_fwd(std::vector<Tensor> sq, std::vector<Tensor> sk, std::vector<Tensor> tq,
                          std::vector<Tensor> tk, std::vector<double> scales, std::optional<Tensor> mask, bool causal) {
  check(Check("attention_cost_fwd"), sq, sk, tq, tk, scales, mask);
  const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
  const AttentionShape shape = shape_of(sq, sk, mask ? keep.const_data_ptr<bool>() : nullptr, causal);
  const Layers layers(sq, sk, tq, tk, scales);
  const int n = layers.students, m = layers.teachers;
  std::vector<double> sums(n * m);
  if (identity_is_cheaper(shape, layers)) {
    sums_by_identity(shape, layers, sums.data());
  } else {
    std::vector<int> students(n), teachers(m);
    std::iota(students.begin(), students.end(), 0);
    std::iota(teachers.begin(), teachers.end(), 0);
    sums_of_scores(shape, layers, students, teachers, sums.data());
  }
  Tensor costs = torch::stable::new_empty(sq[0], {n, m}, ScalarType::Float);
  float* out = costs.mutable_data_ptr<float>();
  for (int pair = 0; pair < n * m; ++pair) out[pair] = float(sums[pair] / shape.entries());
  return costs;
}

// The gradients of one student's queries and keys in one unit of work.
struct ScoreGradient {
  std::vector<float> slope, of_queries, of_keys;  // [block, padded], [block, d], [keys that count, d]
  std::vector<char> keys, packed_slope, packed_queries;

  void begin(Scores& unit, int i) {
    const LayerHeads& k = unit.layers.k[i];
    slope.assign(unit.block * unit.padded, 0.f);
    of_queries.resize(unit.block * k.width);
    of_keys.assign(unit.valid * k.width, 0.f);
    const GemmSource x = unit.keys_of(i);
    const Gemm& product = gemm(x.element, true);
    keys.resize(product.bytes_b(x.k, x.rows));
    product.pack_b(transposed(x), keys.data());
  }
  // slope = sum of weight (S - T); queries get slope K, keys slope^T Q.
  void run(Scores& unit, int i, int64_t begin, int64_t rows) {
    const int64_t width = unit.layers.q[i].width;
    const float scale = unit.layers.scale[i];
    const GemmSource q = unit.queries_of(i, begin, rows);
    const Gemm& product = gemm(q.element, true);
    packed_slope.resize(std::max(product.bytes_a(rows, unit.valid), product.bytes_a(unit.valid, rows)));
    product.pack_a({slope.data(), kFloat32, unit.padded, 1, rows, unit.valid}, packed_slope.data());
    product.tile(packed_slope.data(), keys.data(), {rows, width, unit.valid}, {of_queries.data(), width, scale, false});
    packed_queries.resize(product.bytes_b(width, rows));
    product.pack_a({slope.data(), kFloat32, 1, unit.padded, unit.valid, rows}, packed_slope.data());
    product.pack_b(transposed(q), packed_queries.data());
    product.tile(packed_slope.data(), packed_queries.data(), {unit.valid, width, rows},
                 {of_keys.data(), width, scale, true});
  }
};

// The gradients of those students that are wanted.
void gradients_from_scores(const AttentionShape& shape, const Layers& layers, std::vector<WeightedTeachers> teachers_of,
                           const std::vector<GradientOutput>& to_q, const std::vector<GradientOutput>& to_k,
                           const std::vector<bool>& wanted) {
  const int n = layers.students;
  for (int i = 0; i < n; ++i)
    if (!wanted[i]) teachers_of[i] = {};
  const std::vector<bool> used = used_layers(teachers_of, layers.teachers);
  const Table& table = chosen_table();
  parallel_for(0, shape.units(), 1, [&](int64_t first, int64_t last) {
    Scores unit(shape, layers);
    std::vector<ScoreGradient> own(n);
    std::vector<const void*> chosen;
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u, used);
      for (int i = 0; i < n; ++i)
        if (used[i]) own[i].begin(unit, i);
      for (int64_t begin = 0; begin < shape.queries; begin += unit.block) {
        const int64_t rows = std::min(unit.block, shape.queries - begin);
        for (int l = 0; unit.valid && l < layers.count(); ++l)
          if (used[l]) unit.compute(l, begin, rows);
        for (int i = 0; i < n; ++i) {
          const int64_t width = layers.q[i].width;
          if (used[i] && unit.valid) {
            chosen.clear();
            for (const int j : teachers_of[i].teacher) chosen.push_back(unit.scores[n + j].data());
            table.gradient(unit.scores[i].data(), kScores, chosen.data(), kScores, teachers_of[i].weight.data(),
                           int(chosen.size()), rows * unit.padded, nullptr, false, own[i].slope.data());
            own[i].run(unit, i, begin, rows);
          } else {
            own[i].of_queries.assign(unit.block * width, 0.f);
          }
          for (int64_t r = 0; wanted[i] && r < rows; ++r)
            to_q[i].write(table, unit.b, unit.h, begin + r, own[i].of_queries.data() + r * width);
        }
      }
      for (int i = 0; i < n; ++i)
        if (wanted[i]) to_k[i].write_keys(table, unit, used[i] ? own[i].of_keys.data() : nullptr);
    }
  });
}

std::vector<Tensor> attention_cost_bwd(const Tensor& grad, std::vector<Tensor> sq, std::vector<Tensor> sk,
                                       std::vector<Tensor> tq, std::vector<Tensor> tk, std::vector<double> scales,
                                       std::optional<Tensor> mask, bool causal) {
  const Check op("attention_cost_bwd");
  check(op, sq, sk, tq, tk, scales, mask);
  op("grad", grad, kF32, "[N, M]", {int64_t(sq.size()), int64_t(tq.size())});
  const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
  const AttentionShape shape = shape_of(sq, sk, mask ? keep.const_data_ptr<bool>() : nullptr, causal);
  const Layers layers(sq, sk, tq, tk, scales);
  const std::vector<WeightedTeachers> teachers_of =
      weighted_teachers(grad, layers.students, layers.teachers, shape.entries());
  const std::vector<GradientOutput> to_q(sq.begin(), sq.end()), to_k(sk.begin(), sk.end());
  std::vector<bool> wanted(layers.students, true);
  if (identity_is_cheaper(shape, layers, teachers_of))
    wanted = identity_gradients(shape, layers, teachers_of, to_q, to_k);
  if (std::find(wanted.begin(), wanted.end(), true) != wanted.end())
    gradients_from_scores(shape, layers, teachers_of, to_q, to_k, wanted);
  std::vector<Tensor> grads;
  for (const auto* side : {&to_q, &to_k})
    for (const GradientOutput& target : *side) grads.push_back(target.tensor);
  return grads;
}

}  // namespace
}  // namespace fastkd::layer_cost

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_cost_fwd", TORCH_BOX(&fastkd::layer_cost::attention_cost_fwd));
  m.impl("attention_cost_bwd", TORCH_BOX(&fastkd::layer_cost::attention_cost_bwd));
}
