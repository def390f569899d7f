// Queries and keys of every layer, one head of one sequence at a time: what the two methods of attention_cost share.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/layer_cost/op.h"
#include "cpu/runtime/tensors.h"

namespace fastkd::layer_cost {

// Queries [B, H, S, d] or keys [B, H, S', d] of one layer.
struct LayerHeads {
  const char* data;
  int element;
  int64_t item, width, stride_b, stride_h, stride_s, stride_d;

  explicit LayerHeads(const Tensor& x)
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

// Students, then teachers.
struct Layers {
  std::vector<LayerHeads> q, k;
  std::vector<float> scale;
  int students, teachers;

  Layers(const std::vector<Tensor>& sq, const std::vector<Tensor>& sk, const std::vector<Tensor>& tq,
         const std::vector<Tensor>& tk, const std::vector<double>& scales)
      : scale(scales.begin(), scales.end()), students(int(sq.size())), teachers(int(tq.size())) {
    for (const auto* side : {&sq, &tq})
      for (const Tensor& x : *side) q.emplace_back(x);
    for (const auto* side : {&sk, &tk})
      for (const Tensor& x : *side) k.emplace_back(x);
  }
  int count() const { return students + teachers; }
};

struct AttentionShape {
  int64_t batch, heads, queries, keys;
  bool causal;
  const bool* mask;  // [B, keys] or null

  int64_t units() const { return batch * heads; }
  double entries() const { return std::max(double(batch) * heads * queries * keys, 1.); }
};

// One head of one sequence.
class AttentionUnit {
 public:
  const AttentionShape& shape;
  const Layers& layers;
  int64_t b = 0, h = 0, valid = 0;
  std::vector<int64_t> position;  // of the keys that count

  AttentionUnit(const AttentionShape& shape, const Layers& layers)
      : shape(shape), layers(layers), keys_(layers.count()) {}

  void begin(int64_t unit) {
    b = unit / shape.heads;
    h = unit % shape.heads;
    position.clear();
    for (int64_t s = 0; s < shape.keys; ++s)
      if (!shape.mask || shape.mask[b * shape.keys + s]) position.push_back(s);
    valid = int64_t(position.size());
  }

  // The keys of layer l that count, gathered if some do not.
  GemmSource keys_of(int l) {
    const LayerHeads& k = layers.k[l];
    if (valid == shape.keys) return {k.row(b, h, 0), k.element, k.stride_s, k.stride_d, valid, k.width};
    const int64_t bytes = k.width * k.item;
    keys_[l].resize(valid * bytes);
    for (int64_t j = 0; j < valid; ++j)
      for (int64_t c = 0; c < k.width; ++c)
        std::memcpy(keys_[l].data() + j * bytes + c * k.item, k.row(b, h, position[j]) + c * k.stride_d * k.item,
                    k.item);
    return {keys_[l].data(), k.element, k.width, 1, valid, k.width};
  }

  GemmSource queries_of(int l, int64_t begin, int64_t rows) const {
    const LayerHeads& q = layers.q[l];
    return {q.row(b, h, begin), q.element, q.stride_s, q.stride_d, rows, q.width};
  }

 private:
  std::vector<std::vector<char>> keys_;
};

inline GemmSource transposed(const GemmSource& x) { return {x.data, x.element, x.k_stride, x.row_stride, x.k, x.rows}; }

// A gradient [B, H, S, d] on its way out: rows of floats, in the layer's own element.
struct GradientOutput {
  Tensor tensor;
  char* data;
  int element;
  int64_t item, heads, length, width;

  explicit GradientOutput(const Tensor& like)
      : tensor(torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2), like.size(3)})),
        data(static_cast<char*>(tensor.mutable_data_ptr())),
        element(element_of(like)),
        item(int64_t(like.element_size())),
        heads(like.size(1)),
        length(like.size(2)),
        width(like.size(3)) {}

  void write(const Table& table, int64_t b, int64_t h, int64_t s, const float* from) const {
    char* to = data + ((b * heads + h) * length + s) * width * item;
    if (element == kFloat32)
      std::memcpy(to, from, width * sizeof(float));
    else
      table.from_float32(from, element, width, to);
  }
  // `from` [keys that count, d]; null: all gradients are 0. The keys that do not count get zeros.
  void write_keys(const Table& table, const AttentionUnit& unit, const float* from) const {
    const std::vector<float> nothing(width, 0.f);
    for (int64_t s = 0, j = 0; s < length; ++s) {
      const bool counts = j < unit.valid && unit.position[j] == s;
      write(table, unit.b, unit.h, s, counts && from ? from + j * width : nothing.data());
      j += counts;
    }
  }
};

// The method by the identity, for long sequences (layer_cost/attention_identity.cpp).
struct WeightedTeachers;
constexpr double kTrusted = 5e-6;  // of a result: how far off the identity may be
bool identity_is_cheaper(const AttentionShape& shape, const Layers& layers);
bool identity_is_cheaper(const AttentionShape& shape, const Layers& layers,
                         const std::vector<WeightedTeachers>& teachers_of);
// sums [students, teachers] of squared differences, and how far off each may be.
void identity_sums(const AttentionShape& shape, const Layers& layers, double* sums, double* error_bounds);
// Which students' gradients may be off by too much.
std::vector<bool> identity_gradients(const AttentionShape& shape, const Layers& layers,
                                     const std::vector<WeightedTeachers>& teachers_of,
                                     const std::vector<GradientOutput>& to_q, const std::vector<GradientOutput>& to_k);

}  // namespace fastkd::layer_cost
