// Layers as rows of dense elements, cut into blocks; the arithmetic of a block is in layer_cost_isa.cpp.
//
// The cut depends on shapes, strides and mask only, and what chunks of blocks found is added up in their order: the
// result is the same, bit for bit, for any number of threads.
#include "cpu/layer_cost.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tensors.h"

FASTKD_DECLARE(LayerCostTable, layer_cost);

namespace fastkd {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // a block of all layers stays in the second cache
constexpr int64_t kBlockStep = 1024;        // blocks are a multiple of it: long enough for the hardware's prefetcher
constexpr int64_t kLongestBlock = 16384;
constexpr int64_t kBlocksPerChunk = 2;
constexpr int64_t kMostChunks = 256;  // so that the partial sums stay small beside the layers
constexpr int64_t kCache = 16 << 20;  // a larger gradient would only push out what is read next

struct Layer {
  Tensor tensor;
  const char* data;
  int element;
  int64_t item;
  std::vector<int64_t> strides;  // of all axes
};

// What all layers share: every index of the leading axes `sizes` is a row of `length` elements that lie together, and
// of `span` rows each starts where the one before it ends. With a mask, a row belongs to one token.
struct Space {
  std::vector<int64_t> sizes;
  int64_t rows, length, span;
  Tensor mask;
  const bool* kept;  // null: every token counts
  int64_t rows_per_token;
  double elements;  // that count: the denominator

  const char* row(const Layer& layer, int64_t row) const {
    int64_t offset = 0;
    for (size_t axis = sizes.size(); axis-- > 0; row /= sizes[axis]) offset += row % sizes[axis] * layer.strides[axis];
    return layer.data + offset * layer.item;
  }
  bool counts(int64_t row) const { return !kept || kept[row / rows_per_token]; }

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

// How the elements of a layer are cut up.
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

int64_t last_axis(const Tensor& x) {
  int64_t axis = x.dim() - 1;
  while (axis > 0 && x.size(axis) == 1) --axis;
  return axis;
}

std::vector<Layer> layers_of(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers) {
  std::vector<Layer> layers;
  for (const auto* side : {&students, &teachers})
    for (const Tensor& given : *side) {
      const int64_t last = last_axis(given);
      const bool dense = given.size(last) <= 1 || given.stride(last) == 1;
      const Tensor x = dense ? given : torch::stable::contiguous(given);
      std::vector<int64_t> strides(x.dim());
      for (int64_t axis = 0; axis < x.dim(); ++axis) strides[axis] = x.stride(axis);
      layers.push_back({x, static_cast<const char*>(x.const_data_ptr()), element_of(x), int64_t(x.element_size()),
                        std::move(strides)});
    }
  return layers;
}

// The first axis of those from which on every layer's elements lie together; `length`: how many they are.
int64_t dense_from(const std::vector<Layer>& layers, int64_t axis, int64_t least, int64_t& length) {
  for (; axis > least; --axis) {
    const int64_t size = layers[0].tensor.size(axis - 1);
    for (const Layer& layer : layers)
      if (size != 1 && layer.strides[axis - 1] != length) return axis;
    length *= size;
  }
  return axis;
}

Space space_of(const std::vector<Layer>& layers, const std::optional<Tensor>& mask) {
  const Tensor& first = layers[0].tensor;
  Space space = {{}, 1, 1, 1, {}, nullptr, 1, double(first.numel())};
  const int64_t axis = dense_from(layers, first.dim(), mask ? 2 : 0, space.length);
  for (int64_t a = 0; a < axis; ++a) {
    space.sizes.push_back(first.size(a));
    space.rows *= first.size(a);
  }
  if (!mask || first.numel() == 0) return space;
  int64_t together = space.length;
  dense_from(layers, axis, 0, together);
  space.span = together / space.length;
  space.mask = torch::stable::contiguous(*mask);
  space.kept = space.mask.const_data_ptr<bool>();
  const int64_t tokens = space.mask.numel(), valid = std::count(space.kept, space.kept + tokens, true);
  space.rows_per_token = space.rows / tokens;
  space.elements = double(std::max<int64_t>(valid, 1) * (first.numel() / tokens));
  return space;
}

// What one thread puts before the arithmetic: the same elements of every layer, as floats.
struct Panel {
  const LayerCostTable& table;
  const std::vector<Layer>& layers;
  const Space& space;
  const float* clamp;
  int64_t block;
  std::vector<float> scratch;
  std::vector<const float*> floats;

  // All that counts of [begin, end), filled up with zeros; where it lies together as it should be, it stays in place.
  int64_t load(int64_t begin, int64_t end) {
    int64_t pieces = 0, used = 0;
    space.pieces(begin, end, [&](int64_t, int64_t, int64_t count, bool valid) {
      pieces += valid;
      used += valid ? count : 0;
    });
    const int64_t padded = (used + kLayerLanes - 1) / kLayerLanes * kLayerLanes;
    int64_t at = 0;
    space.pieces(begin, end, [&](int64_t row, int64_t column, int64_t count, bool valid) {
      if (!valid) return;
      for (size_t l = 0; l < layers.size(); ++l) {
        const Layer& layer = layers[l];
        const char* from = space.row(layer, row) + column * layer.item;
        if (pieces == 1 && padded == used && layer.element == kFloat32 && !clamp)
          floats[l] = reinterpret_cast<const float*>(from);
        else
          table.pack(from, layer.element, clamp, count, own(l) + at);
      }
      at += count;
    });
    if (padded != used)
      for (size_t l = 0; l < layers.size(); ++l) std::fill(own(l) + used, own(l) + padded, 0.f);
    return padded;
  }
  float* own(size_t l) {
    if (scratch.empty()) scratch.resize(layers.size() * block);
    float* place = scratch.data() + l * block;
    floats[l] = place;
    return place;
  }
};

Tensor layer_cost_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> mask,
                      std::optional<double> clamp) {
  const std::vector<Layer> layers = layers_of(students, teachers);
  const Space space = space_of(layers, mask);
  const Blocks blocks(space, layers.size());
  const int n = int(students.size()), m = int(teachers.size());
  const int64_t pairs = int64_t(n) * m;
  const float limit = clamp ? float(*clamp) : 0;
  const LayerCostTable& table = FASTKD_CHOOSE(layer_cost);
  std::vector<double> partial(blocks.chunks * pairs);
  parallel_for(0, blocks.chunks, 1, [&](int64_t begin, int64_t end) {
    Panel panel = {table, layers, space, clamp ? &limit : nullptr, blocks.block, {}, {}};
    panel.floats.resize(layers.size());
    std::vector<double> lanes(pairs * kLayerLanes);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill(lanes.begin(), lanes.end(), 0.);
      blocks.of(chunk, [&](int64_t from, int64_t to) {
        const int64_t count = panel.load(from, to);
        if (count) table.distances(panel.floats.data(), n, panel.floats.data() + n, m, count, lanes.data());
      });
      for (int64_t i = 0; i < pairs * kLayerLanes; ++i) partial[chunk * pairs + i / kLayerLanes] += lanes[i];
    }
  });
  Tensor costs = torch::stable::new_empty(students[0], {n, m}, ScalarType::Float);
  float* out = costs.mutable_data_ptr<float>();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < blocks.chunks; ++chunk) sum += partial[chunk * pairs + pair];
    out[pair] = float(sum / space.elements);
  }
  return costs;
}

// The teachers that a student's gradient needs: those with a weight, be it NaN.
struct Pull {
  std::vector<int> teacher;
  std::vector<float> weight;
};

std::vector<Pull> pulls_of(const Tensor& grad, int n, int m, double elements) {
  const Tensor dense = torch::stable::contiguous(grad);
  const float* g = dense.const_data_ptr<float>();
  std::vector<Pull> pulls(n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < m; ++j)
      if (g[i * m + j] != 0) {
        pulls[i].teacher.push_back(j);
        pulls[i].weight.push_back(float(2 * double(g[i * m + j]) / elements));
      }
  return pulls;
}

// What one thread needs for its part of the gradients.
struct Backward {
  const LayerCostTable& table;
  const std::vector<Layer>& layers;
  const Space& space;
  const std::vector<Pull>& pulls;
  const std::vector<char*>& out;
  const float* clamp;
  int64_t block;
  bool stream;
  std::vector<float> scratch;
  std::vector<const float*> floats, chosen;

  float* own(size_t l) {
    if (scratch.empty()) scratch.resize((layers.size() + 1) * block);
    return scratch.data() + l * block;
  }
  const float* read(size_t l, int64_t row, int64_t column, int64_t count) {
    const char* from = space.row(layers[l], row) + column * layers[l].item;
    if (layers[l].element == kFloat32) return reinterpret_cast<const float*>(from);
    table.pack(from, layers[l].element, nullptr, count, own(l));
    return own(l);
  }
  // A piece that lies together in every layer; the gradient has no gaps at all.
  void run(int64_t row, int64_t column, int64_t count, bool valid) {
    const int64_t place = row * space.length + column;
    floats.assign(layers.size(), nullptr);
    for (size_t i = 0; i < pulls.size(); ++i) {
      const Pull& pull = pulls[i];
      char* to = out[i] + place * layers[i].item;
      if (!valid || pull.teacher.empty()) {
        std::memset(to, 0, count * layers[i].item);
        continue;
      }
      chosen.clear();
      for (const int j : pull.teacher) {
        const size_t l = pulls.size() + j;
        if (!floats[l]) floats[l] = read(l, row, column, count);
        chosen.push_back(floats[l]);
      }
      const float* s = read(i, row, column, count);
      const bool wide = layers[i].element == kFloat32;
      float* target = wide ? reinterpret_cast<float*>(to) : own(layers.size());
      table.gradient(s, chosen.data(), pull.weight.data(), int(chosen.size()), count, clamp, stream && wide, target);
      if (!wide) table.narrow(target, layers[i].element, count, stream, reinterpret_cast<uint16_t*>(to));
    }
  }
};

std::vector<Tensor> empty_gradients(const std::vector<Tensor>& students) {
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < students[0].dim(); ++axis) shape.push_back(students[0].size(axis));
  std::vector<Tensor> grads;
  for (const Tensor& student : students) {
    grads.push_back(torch::stable::new_empty(student, shape));
    use_huge_pages(grads.back());
  }
  return grads;
}

std::vector<Tensor> layer_cost_bwd(const Tensor& grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                                   std::optional<Tensor> mask, std::optional<double> clamp) {
  const std::vector<Layer> layers = layers_of(students, teachers);
  const Space space = space_of(layers, mask);
  const Blocks blocks(space, layers.size());
  const std::vector<Pull> pulls = pulls_of(grad, int(students.size()), int(teachers.size()), space.elements);
  std::vector<Tensor> grads = empty_gradients(students);
  std::vector<char*> out;
  int64_t bytes = 0;
  for (const Tensor& x : grads) {
    out.push_back(static_cast<char*>(x.mutable_data_ptr()));
    bytes += x.numel() * int64_t(x.element_size());
  }
  const float limit = clamp ? float(*clamp) : 0;
  const LayerCostTable& table = FASTKD_CHOOSE(layer_cost);
  parallel_for(0, blocks.chunks, 1, [&](int64_t begin, int64_t end) {
    Backward backward = {table,        layers,          space, pulls, out, clamp ? &limit : nullptr,
                         blocks.block, bytes >= kCache, {},    {},    {}};
    for (int64_t chunk = end; chunk-- > begin;)  // backwards, from what the forward left in the cache
      blocks.of(chunk, [&](int64_t from, int64_t to) {
        space.pieces(from, to, [&](int64_t row, int64_t column, int64_t count, bool valid) {
          backward.run(row, column, count, valid);
        });
      });
  });
  return grads;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("layer_cost_fwd", TORCH_BOX(&fastkd::layer_cost_fwd));
  m.impl("layer_cost_bwd", TORCH_BOX(&fastkd::layer_cost_bwd));
}
