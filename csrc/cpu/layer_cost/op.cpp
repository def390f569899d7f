// Blocks of all layers over torch's own thread pool; the arithmetic of a block is in layer_cost/op_isa.cpp.
//
// What chunks of blocks found is added up in their order: the result is the same, bit for bit, for any number of
// threads.
#include "cpu/layer_cost/op.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/layer_cost/space.h"
#include "cpu/runtime/tensors.h"
#include "cpu/simd/isa.h"

namespace fastkd::layer_cost {
namespace {

constexpr int64_t kCache = 16 << 20;  // larger gradients would only push out what is read next

// What one thread puts before the arithmetic: the same elements of every layer.
struct Panel {
  const Table& table;
  const std::vector<Layer>& layers;
  const Space& space;
  const Elements natural;
  const float* clamp;
  const int64_t block;
  std::vector<float> scratch;
  std::vector<const void*> data;
  bool in_place = false;  // nothing of this block was packed: the layers come in their natural elements

  Panel(const Table& table, const std::vector<Layer>& layers, size_t students, const Space& space, const float* clamp,
        int64_t block)
      : table(table),
        layers(layers),
        space(space),
        natural(layers, students),
        clamp(clamp),
        block(block),
        data(layers.size()) {}

  // All that counts of [begin, end), filled up with zeros; where it lies together as it should be, it stays in place.
  int64_t load(int64_t begin, int64_t end) {
    int64_t pieces = 0, used = 0, done = 0;
    space.pieces(begin, end, [&](int64_t, int64_t, int64_t count, bool valid) {
      pieces += valid;
      used += valid ? count : 0;
    });
    const int64_t padded = (used + kLayerPad - 1) / kLayerPad * kLayerPad;
    const bool whole = pieces == 1 && padded == used && !clamp;
    in_place = whole && natural.t != kFloat32;
    space.pieces(begin, end, [&](int64_t row, int64_t column, int64_t count, bool valid) {
      if (!valid) return;
      for (size_t l = 0; l < layers.size(); ++l) {
        const void* from = space.at(layers[l], row, column);
        if (in_place || (whole && layers[l].element == kFloat32))
          data[l] = from;
        else
          table.to_float32(from, layers[l].element, clamp, count, own(l) + done);
      }
      done += count;
    });
    if (padded != used)
      for (size_t l = 0; l < layers.size(); ++l) std::fill(own(l) + used, own(l) + padded, 0.f);
    return padded;
  }
  float* own(size_t l) {
    if (scratch.empty()) scratch.resize(layers.size() * block);
    float* place = scratch.data() + l * block;
    data[l] = place;
    return place;
  }
};

// Layers of one shape, of any number of axes; [B, S, ...] under a mask [B, S].
void check(const Check& check, const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
           const std::optional<Tensor>& mask) {
  check.length("students", students, kAny);
  check.length("teachers", teachers, kAny);
  const Tensor& first = students[0];
  check.that(first.dim() >= (mask ? 2 : 1), "students[0]", mask ? "[B, S, ...]" : "at least one axis", first.dim());
  for (const auto* side : {&students, &teachers})
    for (size_t i = 0; i < side->size(); ++i)
      check.like(side == &students ? "students" : "teachers", (*side)[i], kFloating, first, int64_t(i));
  if (mask) check("mask", *mask, kBool, "[B, S]", {first.size(0), first.size(1)});
}

Tensor layer_cost_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> mask,
                      std::optional<double> clamp) {
  check(Check("layer_cost_fwd"), students, teachers, mask);
  const std::vector<Layer> layers = layers_of(students, teachers);
  const Space space(layers, mask);
  const Blocks blocks(space, layers.size());
  const int n = int(students.size()), m = int(teachers.size());
  const int64_t pairs = int64_t(n) * m;
  const float limit = clamp ? float(*clamp) : 0;
  const Table& table = chosen_table();
  std::vector<double> partial(blocks.chunks * pairs);
  parallel_for(0, blocks.chunks, 1, [&](int64_t begin, int64_t end) {
    Panel panel(table, layers, n, space, clamp ? &limit : nullptr, blocks.block);
    const void** data = panel.data.data();
    std::vector<double> sums(pairs * kLayerSums);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill(sums.begin(), sums.end(), 0.);
      blocks.of(chunk, [&](int64_t from, int64_t to) {
        const int64_t count = panel.load(from, to);
        const Elements as = panel.natural;
        if (count)
          table.squared_distances(data, panel.in_place ? as.s : kFloat32, n, data + n, panel.in_place ? as.t : kFloat32,
                                  m, count, sums.data());
      });
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const double* first = sums.data() + pair * kLayerSums;
        partial[chunk * pairs + pair] = std::accumulate(first, first + kLayerSums, 0.);
      }
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

// What one thread needs for its part of the gradients.
struct Backward {
  const Table& table;
  const std::vector<Layer>& layers;
  const Space& space;
  const std::vector<WeightedTeachers>& teachers_of;
  const std::vector<char*>& out;
  const Elements elements;
  const float* clamp;
  const int64_t block;
  const bool stream;
  std::vector<float> scratch;
  std::vector<const void*> data, chosen;

  float* own(size_t l) {
    if (scratch.empty()) scratch.resize((layers.size() + 1) * block);
    return scratch.data() + l * block;
  }
  const void* read(size_t l, int element, int64_t row, int64_t column, int64_t count) {
    const void* from = space.at(layers[l], row, column);
    if (layers[l].element == element) return from;
    table.to_float32(from, layers[l].element, nullptr, count, own(l));
    return own(l);
  }
  // A piece that lies together in every layer; the gradients have no gaps at all.
  void run(int64_t row, int64_t column, int64_t count, bool valid) {
    const int64_t place = row * space.length + column;
    data.assign(layers.size(), nullptr);
    for (size_t i = 0; i < teachers_of.size(); ++i) {
      const WeightedTeachers& teachers = teachers_of[i];
      char* to = out[i] + place * layers[i].item;
      if (!valid || teachers.teacher.empty()) {
        std::memset(to, 0, count * layers[i].item);
        continue;
      }
      chosen.clear();
      for (const int j : teachers.teacher) {
        const size_t l = teachers_of.size() + j;
        if (!data[l]) data[l] = read(l, elements.t, row, column, count);
        chosen.push_back(data[l]);
      }
      const void* s = read(i, elements.s, row, column, count);
      const bool rounded = layers[i].element != elements.s;
      void* target = rounded ? static_cast<void*>(own(layers.size())) : to;
      table.gradient(s, elements.s, chosen.data(), elements.t, teachers.weight.data(), int(chosen.size()), count, clamp,
                     stream && !rounded, target);
      if (rounded) table.from_float32(static_cast<float*>(target), layers[i].element, count, to);
    }
  }
};

std::vector<Tensor> layer_cost_bwd(const Tensor& grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                                   std::optional<Tensor> mask, std::optional<double> clamp) {
  const Check op("layer_cost_bwd");
  check(op, students, teachers, mask);
  op("grad", grad, kF32, "[N, M]", {int64_t(students.size()), int64_t(teachers.size())});
  const std::vector<Layer> layers = layers_of(students, teachers);
  const Space space(layers, mask);
  const Blocks blocks(space, layers.size());
  const std::vector<WeightedTeachers> teachers_of =
      weighted_teachers(grad, int(students.size()), int(teachers.size()), space.elements);
  std::vector<Tensor> grads;
  std::vector<char*> out;
  int64_t bytes = 0;
  for (const Tensor& student : students) {
    grads.push_back(torch::stable::new_empty(student, student.sizes()));
    use_huge_pages(grads.back());
    out.push_back(static_cast<char*>(grads.back().mutable_data_ptr()));
    bytes += student.numel() * int64_t(student.element_size());
  }
  const float limit = clamp ? float(*clamp) : 0;
  const Elements elements(layers, students.size());
  parallel_for(0, blocks.chunks, 1, [&](int64_t begin, int64_t end) {
    Backward backward = {chosen_table(),           layers,       space,           teachers_of, out, elements,
                         clamp ? &limit : nullptr, blocks.block, bytes >= kCache, {},          {},  {}};
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
}  // namespace fastkd::layer_cost

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("layer_cost_fwd", TORCH_BOX(&fastkd::layer_cost::layer_cost_fwd));
  m.impl("layer_cost_bwd", TORCH_BOX(&fastkd::layer_cost::layer_cost_bwd));
}
