// Mean squared differences between attention scores, from queries and keys: of every head a few rows of all layers'
// scores at a time, in the second cache. No S x S matrix exists; the backward makes the rows again.
//
// A head of a sequence is one unit of work, and the units' sums are added up in their order: the result is the same,
// bit for bit, for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/layer_cost.h"
#include "cpu/tensors.h"

FASTKD_DECLARE(LayerCostTable, layer_cost);

namespace fastkd {
namespace {

constexpr int64_t kCacheBytes = 512 << 10;  // for the scores of all layers: half of a second cache
constexpr int64_t kScores = kFloat32;       // scores are floats, whatever the layers are

// Queries [B, H, S, d] or keys [B, H, S', d] of one layer.
struct Heads {
  const char* data;
  int element;
  int64_t item, width, stride_b, stride_h, stride_s, stride_d;

  explicit Heads(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        element(element_of(x)),
        item(int64_t(x.element_size())),
        width(x.size(3)),
        stride_b(x.stride(0)),
        stride_h(x.stride(1)),
        stride_s(x.stride(2)),
        stride_d(x.stride(3)) {}

  const char* row(int64_t b, int64_t h, int64_t s) const {
    return data + (b * stride_b + h * stride_h + s * stride_s) * item;
  }
};

struct Layers {
  std::vector<Heads> q, k;
  size_t students;

  Layers(const std::vector<Tensor>& sq, const std::vector<Tensor>& sk, const std::vector<Tensor>& tq,
         const std::vector<Tensor>& tk)
      : students(sq.size()) {
    for (const auto* side : {&sq, &tq})
      for (const Tensor& x : *side) q.emplace_back(x);
    for (const auto* side : {&sk, &tk})
      for (const Tensor& x : *side) k.emplace_back(x);
    for (size_t l = 0; l < q.size(); ++l)
      STD_TORCH_CHECK(q[l].element == k[l].element && q[l].width == k[l].width, "attention_cost: q and k of a layer");
  }
  size_t count() const { return q.size(); }
};

struct Shape {
  int64_t batch, heads, queries, keys;
  bool causal;
  const bool* mask;  // [B, keys] or null
  double scale;      // 0: one over the root of each layer's width

  int64_t units() const { return batch * heads; }
  double entries() const { return double(batch) * heads * queries * keys; }
  float scale_of(const Heads& x) const { return float(scale > 0 ? scale : 1 / std::sqrt(double(x.width))); }
};

// One head of one sequence: packed keys, and blocks of scores.
class Unit {
 public:
  const Shape& shape;
  const Layers& layers;
  int64_t b = 0, h = 0, valid = 0, padded = 0, block = 0;  // keys that count, their row in a block, rows of a block
  std::vector<int64_t> position;                           // of the keys that count
  std::vector<std::vector<float>> scores;                  // per layer [block, padded]

  Unit(const Shape& shape, const Layers& layers)
      : shape(shape), layers(layers), scores(layers.count()), keys_(layers.count()), packed_(layers.count()) {}

  // used: the layers whose scores will be asked for.
  void begin(int64_t unit, const std::vector<bool>& used) {
    b = unit / shape.heads;
    h = unit % shape.heads;
    position.clear();
    for (int64_t s = 0; s < shape.keys; ++s)
      if (!shape.mask || shape.mask[b * shape.keys + s]) position.push_back(s);
    valid = int64_t(position.size());
    padded = (valid + kLayerPad - 1) / kLayerPad * kLayerPad;
    const int64_t bytes = std::max<int64_t>(int64_t(layers.count()) * padded * int64_t(sizeof(float)), 1);
    block = std::min(shape.queries, std::max<int64_t>(kCacheBytes / bytes, 8));
    for (size_t l = 0; l < layers.count(); ++l) {
      if (!used[l] || valid == 0) continue;
      scores[l].assign(block * padded, 0.f);  // what pads a row stays 0
      const GemmSource source = keys_of(l);
      const Gemm& product = gemm(source.element);
      packed_[l].resize(product.bytes_b(valid, source.k));
      product.pack_b(source, packed_[l].data());
    }
  }

  // The keys of layer l that count, gathered if some do not.
  GemmSource keys_of(size_t l) {
    const Heads& k = layers.k[l];
    if (valid == shape.keys) return {k.row(b, h, 0), k.element, k.stride_s, k.stride_d, valid, k.width};
    const int64_t bytes = k.width * k.item;
    keys_[l].resize(valid * bytes);
    for (int64_t j = 0; j < valid; ++j)
      for (int64_t c = 0; c < k.width; ++c)
        std::memcpy(keys_[l].data() + j * bytes + c * k.item, k.row(b, h, position[j]) + c * k.stride_d * k.item,
                    k.item);
    return {keys_[l].data(), k.element, k.width, 1, valid, k.width};
  }

  GemmSource queries_of(size_t l, int64_t begin, int64_t rows) const {
    const Heads& q = layers.q[l];
    return {q.row(b, h, begin), q.element, q.stride_s, q.stride_d, rows, q.width};
  }

  void compute(size_t l, int64_t begin, int64_t rows) {
    const GemmSource source = queries_of(l, begin, rows);
    const Gemm& product = gemm(source.element);
    workspace_.resize(product.bytes_a(rows, source.k));
    product.pack_a(source, workspace_.data());
    float* out = scores[l].data();
    product.tile(workspace_.data(), packed_[l].data(), {rows, valid, source.k},
                 {out, padded, shape.scale_of(layers.q[l]), false});
    if (!shape.causal) return;
    for (int64_t r = 0; r < rows; ++r) {
      const auto later = std::upper_bound(position.begin(), position.end(), begin + r) - position.begin();
      std::fill(out + r * padded + later, out + r * padded + valid, 0.f);
    }
  }

 private:
  std::vector<std::vector<char>> keys_, packed_;
  std::vector<char> workspace_;
};

Shape shape_of(const std::vector<Tensor>& sq, const std::vector<Tensor>& sk, const bool* mask, bool causal,
               double scale) {
  return {sq[0].size(0), sq[0].size(1), sq[0].size(2), sk[0].size(2), causal, mask, scale};
}

Tensor attention_cost_fwd(std::vector<Tensor> sq, std::vector<Tensor> sk, std::vector<Tensor> tq,
                          std::vector<Tensor> tk, std::optional<Tensor> mask, bool causal, double scale) {
  const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
  const Shape shape = shape_of(sq, sk, mask ? keep.const_data_ptr<bool>() : nullptr, causal, scale);
  const Layers layers(sq, sk, tq, tk);
  const int n = int(sq.size()), m = int(tq.size());
  const int64_t pairs = int64_t(n) * m;
  const LayerCostTable& table = FASTKD_CHOOSE(layer_cost);
  std::vector<double> partial(shape.units() * pairs);
  parallel_for(0, shape.units(), 1, [&](int64_t first, int64_t last) {
    Unit unit(shape, layers);
    const std::vector<bool> all(layers.count(), true);
    std::vector<const void*> data(layers.count());
    std::vector<double> sums(pairs * kLayerSums);
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u, all);
      std::fill(sums.begin(), sums.end(), 0.);
      for (int64_t begin = 0; unit.valid && begin < shape.queries; begin += unit.block) {
        const int64_t rows = std::min(unit.block, shape.queries - begin);
        for (size_t l = 0; l < layers.count(); ++l) {
          unit.compute(l, begin, rows);
          data[l] = unit.scores[l].data();
        }
        table.distances(data.data(), kScores, n, data.data() + n, kScores, m, rows * unit.padded, sums.data());
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const double* lanes = sums.data() + pair * kLayerSums;
        partial[u * pairs + pair] = std::accumulate(lanes, lanes + kLayerSums, 0.);
      }
    }
  });
  Tensor costs = torch::stable::new_empty(sq[0], {n, m}, ScalarType::Float);
  float* out = costs.mutable_data_ptr<float>();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double sum = 0;
    for (int64_t u = 0; u < shape.units(); ++u) sum += partial[u * pairs + pair];
    out[pair] = float(sum / shape.entries());
  }
  return costs;
}

// A gradient [B, H, S, d] on its way out: rows of floats, in the layer's own element.
struct Target {
  Tensor tensor;
  char* data;
  int element;
  int64_t item, heads, length, width;

  explicit Target(const Tensor& like)
      : tensor(torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2), like.size(3)})),
        data(static_cast<char*>(tensor.mutable_data_ptr())),
        element(element_of(like)),
        item(int64_t(like.element_size())),
        heads(like.size(1)),
        length(like.size(2)),
        width(like.size(3)) {}

  void write(const LayerCostTable& table, int64_t b, int64_t h, int64_t s, const float* from) const {
    char* to = data + ((b * heads + h) * length + s) * width * item;
    if (element == kFloat32)
      std::memcpy(to, from, width * sizeof(float));
    else
      table.narrow(from, element, width, to);
  }
};

// The gradients of one student's queries and keys in one unit of work.
struct Pull {
  std::vector<int> teacher;
  std::vector<float> weight;
  std::vector<float> slope, of_queries, of_keys;  // [block, padded], [block, d], [keys that count, d]
  std::vector<char> keys, packed_slope, packed_queries;

  void begin(Unit& unit, size_t i) {
    const Heads& k = unit.layers.k[i];
    slope.assign(unit.block * unit.padded, 0.f);
    of_queries.resize(unit.block * k.width);
    of_keys.assign(unit.valid * k.width, 0.f);
    const GemmSource x = unit.keys_of(i);
    const Gemm& product = gemm(x.element, true);
    keys.resize(product.bytes_b(x.k, x.rows));
    product.pack_b({x.data, x.element, x.k_stride, x.row_stride, x.k, x.rows}, keys.data());  // turned
  }
  // slope = sum of weight (S - T); queries get slope K, keys slope^T Q.
  void run(Unit& unit, size_t i, int64_t begin, int64_t rows) {
    const int64_t width = unit.layers.q[i].width;
    const float scale = unit.shape.scale_of(unit.layers.q[i]);
    const GemmSource q = unit.queries_of(i, begin, rows);
    const Gemm& product = gemm(q.element, true);
    packed_slope.resize(std::max(product.bytes_a(rows, unit.valid), product.bytes_a(unit.valid, rows)));
    product.pack_a({slope.data(), kFloat32, unit.padded, 1, rows, unit.valid}, packed_slope.data());
    product.tile(packed_slope.data(), keys.data(), {rows, width, unit.valid}, {of_queries.data(), width, scale, false});
    packed_queries.resize(product.bytes_b(width, rows));
    product.pack_a({slope.data(), kFloat32, 1, unit.padded, unit.valid, rows}, packed_slope.data());
    product.pack_b({q.data, q.element, q.k_stride, q.row_stride, width, rows}, packed_queries.data());
    product.tile(packed_slope.data(), packed_queries.data(), {unit.valid, width, rows},
                 {of_keys.data(), width, scale, true});
  }
};

std::vector<Pull> pulls_of(const Tensor& grad, int n, int m, double entries) {
  const Tensor dense = torch::stable::contiguous(grad);
  const float* g = dense.const_data_ptr<float>();
  std::vector<Pull> pulls(n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < m; ++j)
      if (g[i * m + j] != 0) {  // NaN counts
        pulls[i].teacher.push_back(j);
        pulls[i].weight.push_back(float(2 * double(g[i * m + j]) / entries));
      }
  return pulls;
}

std::vector<Tensor> attention_cost_bwd(const Tensor& grad, std::vector<Tensor> sq, std::vector<Tensor> sk,
                                       std::vector<Tensor> tq, std::vector<Tensor> tk, std::optional<Tensor> mask,
                                       bool causal, double scale) {
  const Tensor keep = mask ? torch::stable::contiguous(*mask) : Tensor();
  const Shape shape = shape_of(sq, sk, mask ? keep.const_data_ptr<bool>() : nullptr, causal, scale);
  const Layers layers(sq, sk, tq, tk);
  const size_t n = sq.size();
  const std::vector<Pull> pulls = pulls_of(grad, int(n), int(tq.size()), shape.entries());
  std::vector<bool> used(layers.count());
  for (size_t i = 0; i < n; ++i)
    for (const int j : pulls[i].teacher) used[i] = used[n + j] = true;
  std::vector<Target> to_q(sq.begin(), sq.end()), to_k(sk.begin(), sk.end());
  const LayerCostTable& table = FASTKD_CHOOSE(layer_cost);
  parallel_for(0, shape.units(), 1, [&](int64_t first, int64_t last) {
    Unit unit(shape, layers);
    std::vector<Pull> own = pulls;
    std::vector<const void*> chosen;
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u, used);
      for (size_t i = 0; i < n; ++i)
        if (used[i]) own[i].begin(unit, i);
      for (int64_t begin = 0; begin < shape.queries; begin += unit.block) {
        const int64_t rows = std::min(unit.block, shape.queries - begin);
        for (size_t l = 0; unit.valid && l < layers.count(); ++l)
          if (used[l]) unit.compute(l, begin, rows);
        for (size_t i = 0; i < n; ++i) {
          Pull& pull = own[i];
          if (used[i] && unit.valid) {
            chosen.clear();
            for (const int j : pull.teacher) chosen.push_back(unit.scores[n + j].data());
            table.gradient(unit.scores[i].data(), kScores, chosen.data(), kScores, pull.weight.data(),
                           int(chosen.size()), rows * unit.padded, nullptr, false, pull.slope.data());
            pull.run(unit, i, begin, rows);
          } else {
            pull.of_queries.assign(unit.block * layers.q[i].width, 0.f);
          }
          for (int64_t r = 0; r < rows; ++r)
            to_q[i].write(table, unit.b, unit.h, begin + r, pull.of_queries.data() + r * layers.q[i].width);
        }
      }
      for (size_t i = 0; i < n; ++i) {
        const std::vector<float> nothing(layers.k[i].width, 0.f);
        for (int64_t s = 0, j = 0; s < shape.keys; ++s) {
          const bool counts = used[i] && j < unit.valid && unit.position[j] == s;
          to_k[i].write(table, unit.b, unit.h, s,
                        counts ? own[i].of_keys.data() + j * layers.k[i].width : nothing.data());
          j += j < unit.valid && unit.position[j] == s;
        }
      }
    }
  });
  std::vector<Tensor> grads;
  for (const auto* side : {&to_q, &to_k})
    for (const Target& target : *side) grads.push_back(target.tensor);
  return grads;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_cost_fwd", TORCH_BOX(&fastkd::attention_cost_fwd));
  m.impl("attention_cost_bwd", TORCH_BOX(&fastkd::attention_cost_bwd));
}
