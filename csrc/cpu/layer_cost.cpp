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

constexpr int64_t kPad = 16;             // blocks are filled up to a multiple of the widest vector
constexpr int64_t kBlocksPerChunk = 64;  // 128 KiB of every layer in float32
constexpr int64_t kMostChunks = 256;     // so that the partial sums stay small beside the layers
constexpr int64_t kCache = 16 << 20;     // a larger gradient would only push out what is read next

struct Layer {
  Tensor tensor;
  const char* data;
  int element;
  int64_t item;
  std::vector<int64_t> strides;  // of all axes
};

// What all layers share: the leading axes `sizes`, whose every index is a row of `length` elements that lie together.
struct Space {
  std::vector<int64_t> sizes;
  int64_t rows, length;

  int64_t offset(const Layer& layer, int64_t row) const {
    int64_t offset = 0;
    for (size_t axis = sizes.size(); axis-- > 0; row /= sizes[axis]) offset += row % sizes[axis] * layer.strides[axis];
    return offset;
  }
  const char* row(const Layer& layer, int64_t row) const { return layer.data + offset(layer, row) * layer.item; }
};

// Blocks of at most kLayerBlock elements: parts of one row, or several short rows.
struct Blocks {
  int64_t part, parts, together, count, per_chunk, chunks;

  Blocks(int64_t rows, int64_t length) {
    parts = length > 0 ? (length + kLayerBlock - 1) / kLayerBlock : 1;
    part = ((length + parts - 1) / parts + kPad - 1) / kPad * kPad;  // alike, so that none is a stub
    together = length > 0 && rows > 1 ? std::max<int64_t>(kLayerBlock / length, 1) : 1;
    count = length > 0 ? (rows + together - 1) / together * parts : 0;
    per_chunk = std::max(kBlocksPerChunk, (count + kMostChunks - 1) / kMostChunks);
    chunks = (count + per_chunk - 1) / per_chunk;
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

// As long rows as the strides of every layer allow, but with a mask no longer than a token.
Space space_of(const std::vector<Layer>& layers, bool masked) {
  const Tensor& first = layers[0].tensor;
  Space space = {{}, 1, 1};
  int64_t axis = first.dim();
  for (; axis > (masked ? 2 : 0); --axis) {
    const int64_t size = first.size(axis - 1);
    const bool together = std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) {
      return size <= 1 || layer.strides[axis - 1] == space.length;
    });
    if (!together) break;
    space.length *= size;
  }
  for (int64_t a = 0; a < axis; ++a) {
    space.sizes.push_back(first.size(a));
    space.rows *= first.size(a);
  }
  return space;
}

// Which tokens count, one byte each; empty without a mask. Rows are tokens, or lie within one.
struct Tokens {
  Tensor mask;
  const bool* kept = nullptr;
  int64_t rows_per_token = 1;
  double elements;  // the denominator

  Tokens(const std::optional<Tensor>& given, const Tensor& first, const Space& space) : elements(first.numel()) {
    if (!given) return;
    mask = torch::stable::contiguous(*given);
    kept = mask.const_data_ptr<bool>();
    const int64_t tokens = mask.numel();
    rows_per_token = tokens > 0 ? std::max<int64_t>(space.rows / tokens, 1) : 1;
    elements =
        double(std::max<int64_t>(std::count(kept, kept + tokens, true), 1)) * (tokens ? first.numel() / tokens : 0);
  }
  bool counts(int64_t row) const { return !kept || kept[row / rows_per_token]; }
};

// What one thread needs to put a block of every layer before the arithmetic.
struct Panel {
  const LayerCostTable& table;
  const std::vector<Layer>& layers;
  const Space& space;
  const float* clamp;
  std::vector<float> scratch;
  std::vector<const float*> blocks;

  Panel(const LayerCostTable& table, const std::vector<Layer>& layers, const Space& space, const float* clamp)
      : table(table), layers(layers), space(space), clamp(clamp), blocks(layers.size()) {}

  float* own(size_t l) {
    if (scratch.empty()) scratch.resize(layers.size() * kLayerBlock);
    return scratch.data() + l * kLayerBlock;
  }
  // `count` elements from `column` of each row, all layers; returns the number of elements, filled up with zeros.
  int64_t load(const int64_t* rows, int64_t row_count, int64_t column, int64_t count) {
    const int64_t used = row_count * count, padded = (used + kPad - 1) / kPad * kPad;
    for (size_t l = 0; l < layers.size(); ++l) {
      const Layer& layer = layers[l];
      if (row_count == 1 && padded == used && layer.element == kFloat32 && !clamp) {
        blocks[l] = reinterpret_cast<const float*>(space.row(layer, *rows)) + column;
        continue;
      }
      float* out = own(l);
      for (int64_t r = 0; r < row_count; ++r)
        table.pack(space.row(layer, rows[r]) + column * layer.item, layer.element, clamp, count, out + r * count);
      std::fill(out + used, out + padded, 0.f);
      blocks[l] = out;
    }
    return padded;
  }
};

Tensor layer_cost_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> mask,
                      std::optional<double> clamp) {
  const std::vector<Layer> layers = layers_of(students, teachers);
  const Space space = space_of(layers, mask.has_value());
  const Tokens tokens(mask, students[0], space);
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < space.rows; ++r)
    if (tokens.counts(r)) rows.push_back(r);
  const Blocks blocks(rows.size(), space.length);
  const int n = int(students.size()), m = int(teachers.size());
  const float limit = clamp ? float(*clamp) : 0;
  const LayerCostTable& table = FASTKD_CHOOSE(layer_cost);
  std::vector<double> partial(blocks.chunks * n * m);
  parallel_for(0, blocks.chunks, 1, [&](int64_t begin, int64_t end) {
    Panel panel(table, layers, space, clamp ? &limit : nullptr);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(blocks.count, (chunk + 1) * blocks.per_chunk);
      for (int64_t b = chunk * blocks.per_chunk; b < last; ++b) {
        const int64_t row = b / blocks.parts * blocks.together, column = b % blocks.parts * blocks.part;
        const int64_t count = panel.load(rows.data() + row, std::min<int64_t>(blocks.together, rows.size() - row),
                                         column, std::min(blocks.part, space.length - column));
        table.distances(panel.blocks.data(), n, panel.blocks.data() + n, m, count, blocks.part,
                        partial.data() + chunk * n * m);
      }
    }
  });
  Tensor costs = torch::stable::new_empty(students[0], {n, m}, ScalarType::Float);
  float* out = costs.mutable_data_ptr<float>();
  for (int64_t pair = 0; pair < int64_t(n) * m; ++pair) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < blocks.chunks; ++chunk) sum += partial[chunk * n * m + pair];
    out[pair] = float(sum / tokens.elements);
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

// The gradients of one thread's blocks.
struct Backward {
  const LayerCostTable& table;
  const std::vector<Layer>& layers;
  const Space& space;
  const std::vector<Pull>& pulls;
  const std::vector<char*>& out;
  const float* clamp;
  bool stream;
  std::vector<float> scratch;
  std::vector<const float*> blocks, chosen;

  const float* floats(size_t l, const char* from, int64_t count) {
    if (layers[l].element == kFloat32) return reinterpret_cast<const float*>(from);
    if (scratch.empty()) scratch.resize((layers.size() + 1) * kLayerBlock);
    float* to = scratch.data() + l * kLayerBlock;
    table.pack(from, layers[l].element, nullptr, count, to);
    return to;
  }
  void clear(int64_t row) {
    for (size_t i = 0; i < pulls.size(); ++i)
      std::memset(out[i] + row * space.length * layers[i].item, 0, space.length * layers[i].item);
  }
  void run(int64_t row, int64_t column, int64_t count) {
    blocks.assign(layers.size(), nullptr);
    for (size_t i = 0; i < pulls.size(); ++i) {
      const Pull& pull = pulls[i];
      const Layer& layer = layers[i];
      char* to = out[i] + (row * space.length + column) * layer.item;
      if (pull.teacher.empty()) {
        std::memset(to, 0, count * layer.item);
        continue;
      }
      chosen.clear();
      for (const int j : pull.teacher) {
        const size_t l = pulls.size() + j;
        if (!blocks[l]) blocks[l] = floats(l, space.row(layers[l], row) + column * layers[l].item, count);
        chosen.push_back(blocks[l]);
      }
      const float* s = floats(i, space.row(layer, row) + column * layer.item, count);
      const bool wide = layer.element == kFloat32;
      float* target = wide ? reinterpret_cast<float*>(to) : scratch.data() + layers.size() * kLayerBlock;
      table.gradient(s, chosen.data(), pull.weight.data(), int(chosen.size()), count, clamp, stream && wide, target);
      if (!wide) table.narrow(target, layer.element, count, stream, reinterpret_cast<uint16_t*>(to));
    }
  }
};

std::vector<Tensor> layer_cost_bwd(const Tensor& grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                                   std::optional<Tensor> mask, std::optional<double> clamp) {
  const std::vector<Layer> layers = layers_of(students, teachers);
  const Space space = space_of(layers, mask.has_value());
  const Tokens tokens(mask, students[0], space);
  const std::vector<Pull> pulls = pulls_of(grad, int(students.size()), int(teachers.size()), tokens.elements);
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < students[0].dim(); ++axis) shape.push_back(students[0].size(axis));
  std::vector<Tensor> grads;
  std::vector<char*> out;
  int64_t bytes = 0;
  for (const Tensor& student : students) {
    grads.push_back(torch::stable::new_empty(student, shape));
    use_huge_pages(grads.back());
    out.push_back(static_cast<char*>(grads.back().mutable_data_ptr()));
    bytes += student.numel() * int64_t(student.element_size());
  }
  const Blocks blocks(space.rows, space.length);
  const float limit = clamp ? float(*clamp) : 0;
  const LayerCostTable& table = FASTKD_CHOOSE(layer_cost);
  parallel_for(0, blocks.chunks, 1, [&](int64_t begin, int64_t end) {
    Backward backward = {table, layers, space, pulls, out, clamp ? &limit : nullptr, bytes >= kCache, {}, {}, {}};
    for (int64_t chunk = end; chunk-- > begin;) {  // from the end, which the forward left in the cache
      const int64_t last = std::min(blocks.count, (chunk + 1) * blocks.per_chunk);
      for (int64_t b = chunk * blocks.per_chunk; b < last; ++b) {
        const int64_t first = b / blocks.parts * blocks.together, column = b % blocks.parts * blocks.part;
        for (int64_t row = first; row < std::min(first + blocks.together, space.rows); ++row) {
          if (tokens.counts(row))
            backward.run(row, column, std::min(blocks.part, space.length - column));
          else if (column == 0)
            backward.clear(row);
        }
      }
    }
  });
  return grads;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("layer_cost_fwd", TORCH_BOX(&fastkd::layer_cost_fwd));
  m.impl("layer_cost_bwd", TORCH_BOX(&fastkd::layer_cost_bwd));
}
