// Layers of any strides as one space of elements, and how it is cut up. The cut depends on shapes, strides and mask
// only, never on the number of threads.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/layer_cost/op.h"
#include "cpu/runtime/tensors.h"

namespace fastkd::layer_cost {

constexpr int64_t kPanelBytes = 640 << 10;  // a block of all layers, as floats, stays in the second cache
constexpr int64_t kBlockStep = 1024;        // blocks are a multiple of it: long enough for the hardware's prefetcher
constexpr int64_t kLongestBlock = 16384;
constexpr int64_t kBlocksPerChunk = 4;
constexpr int64_t kMostChunks = 128;  // so that partial sums stay small beside the layers

struct Layer {
  Tensor tensor;  // keeps a copy alive where one was needed
  const char* data;
  int element;
  int64_t item;
  std::vector<int64_t> strides;  // of all axes
};

// Copied only where the elements of the last axis do not lie side by side.
inline std::vector<Layer> layers_of(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers) {
  std::vector<Layer> layers;
  layers.reserve(students.size() + teachers.size());
  for (const auto* side : {&students, &teachers})
    for (const Tensor& given : *side) {
      const auto sizes = given.sizes();
      size_t last = sizes.size() - 1;
      while (last > 0 && sizes[last] == 1) --last;
      const bool dense = sizes[last] <= 1 || given.strides()[last] == 1;
      const Tensor x = dense ? given : torch::stable::contiguous(given);
      const auto strides = x.strides();
      layers.push_back({x,
                        static_cast<const char*>(x.const_data_ptr()),
                        element_of(x),
                        int64_t(x.element_size()),
                        {strides.begin(), strides.end()}});
    }
  return layers;
}

// The first axis of those from which on every layer's elements lie together; `length`: how many they are.
inline size_t dense_from(const std::vector<Layer>& layers, size_t axis, size_t least, int64_t& length) {
  const auto sizes = layers[0].tensor.sizes();
  for (; axis > least; --axis) {
    for (const Layer& layer : layers)
      if (sizes[axis - 1] != 1 && layer.strides[axis - 1] != length) return axis;
    length *= sizes[axis - 1];
  }
  return axis;
}

// Every index of the leading axes `sizes` is a row of `length` elements that lie together in every layer, and of `span`
// rows each starts where the one before it ends. With a mask, a row belongs to one token.
struct Space {
  std::vector<int64_t> sizes;
  int64_t rows = 1, length = 1, span = 1;
  Tensor mask;
  const bool* valid_tokens = nullptr;  // null: every token counts
  int64_t rows_per_token = 1;
  double elements;  // that count: the denominator

  Space(const std::vector<Layer>& layers, const std::optional<Tensor>& given) {
    const Tensor& first = layers[0].tensor;
    const int64_t numel = first.numel();
    elements = double(std::max<int64_t>(numel, 1));
    const size_t axis = dense_from(layers, first.dim(), given ? 2 : 0, length);
    for (size_t a = 0; a < axis; ++a) {
      sizes.push_back(first.size(a));
      rows *= first.size(a);
    }
    if (!given || numel == 0) return;
    int64_t together = length;
    dense_from(layers, axis, 0, together);
    span = together / length;
    mask = torch::stable::contiguous(*given);
    valid_tokens = mask.const_data_ptr<bool>();
    const int64_t tokens = mask.numel(), valid = std::count(valid_tokens, valid_tokens + tokens, true);
    rows_per_token = rows / tokens;
    elements = double(std::max<int64_t>(valid, 1) * (numel / tokens));
  }

  const char* at(const Layer& layer, int64_t row, int64_t column) const {
    int64_t offset = column;
    for (size_t axis = sizes.size(); axis-- > 0; row /= sizes[axis]) offset += row % sizes[axis] * layer.strides[axis];
    return layer.data + offset * layer.item;
  }
  bool counts(int64_t row) const { return !valid_tokens || valid_tokens[row / rows_per_token]; }

  // f(row, column, count, counts): [begin, end) in pieces that lie together in every layer.
  template <class F>
  void pieces(int64_t begin, int64_t end, F&& f) const {
    while (begin < end) {
      const int64_t first = begin / length;
      const bool valid = counts(first);
      int64_t next = first + 1;
      while (next * length < end && next % span != 0 && counts(next) == valid) ++next;
      const int64_t stop = std::min(end, next * length);
      f(first, begin % length, stop - begin, valid);
      begin = stop;
    }
  }
};

// Blocks of elements, the same in every layer, and chunks of blocks: what one thread takes at a time.
struct Blocks {
  int64_t total, block, count, per_chunk, chunks;

  Blocks(const Space& space, size_t layers) : total(space.rows * space.length) {
    const int64_t fitting = kPanelBytes / int64_t(sizeof(float) * layers) / kBlockStep * kBlockStep;
    block = std::min(std::max(fitting, kBlockStep), kLongestBlock);
    count = (total + block - 1) / block;
    per_chunk = std::max(kBlocksPerChunk, (count + kMostChunks - 1) / kMostChunks);
    chunks = (count + per_chunk - 1) / per_chunk;
  }
  // f(begin, end) for every block of a chunk.
  template <class F>
  void of(int64_t chunk, F&& f) const {
    const int64_t last = std::min(count, (chunk + 1) * per_chunk);
    for (int64_t b = chunk * per_chunk; b < last; ++b) f(b * block, std::min(total, (b + 1) * block));
  }
};

// The element of each side where the kernels read the layers as they are; float32 where some of them must be packed.
struct Elements {
  int s = kFloat32, t = kFloat32;

  Elements(const std::vector<Layer>& layers, size_t students) {
    const int first_s = layers[0].element, first_t = layers[students].element;
    for (size_t l = 0; l < layers.size(); ++l)
      if (layers[l].element != (l < students ? first_s : first_t)) return;
    if (layers_are_read_as_they_are(first_s, first_t)) s = first_s, t = first_t;
  }
};

// The teachers that a student's gradient needs: those with a weight, be it NaN.
struct WeightedTeachers {
  std::vector<int> teacher;
  std::vector<float> weight;
};

inline std::vector<WeightedTeachers> weighted_teachers(const Tensor& grad, int students, int teachers,
                                                       double elements) {
  const Tensor dense = torch::stable::contiguous(grad);
  const float* g = dense.const_data_ptr<float>();
  std::vector<WeightedTeachers> teachers_of(students);
  for (int i = 0; i < students; ++i)
    for (int j = 0; j < teachers; ++j)
      if (g[i * teachers + j] != 0) {
        teachers_of[i].teacher.push_back(j);
        teachers_of[i].weight.push_back(float(2 * double(g[i * teachers + j]) / elements));
      }
  return teachers_of;
}

// Students, then teachers: whose data a gradient reads.
inline std::vector<bool> used_layers(const std::vector<WeightedTeachers>& teachers_of, int teachers) {
  const size_t students = teachers_of.size();
  std::vector<bool> used(students + teachers);
  for (size_t i = 0; i < students; ++i)
    for (const int j : teachers_of[i].teacher) used[i] = used[students + j] = true;
  return used;
}

}  // namespace fastkd::layer_cost
