// Around the losses: which rows of the bank are a query's negatives, what the bank keeps of the query, NCE's
// normaliser. fastkd/reference/contrast_*.py are the definition; draws are the same numbers, bit for bit.
#include <atomic>
#include <cmath>
#include <unordered_map>
#include <vector>

#include "cpu/contrast/op.h"
#include "cpu/contrast/rows.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The first places of a shuffle of very many cards, swap after swap: only places that a swap touched are kept.
class Shuffle {
 public:
  explicit Shuffle(int64_t count) : front_(count) {
    size_t size = 4;
    while (size < 2 * size_t(count)) size *= 2;
    slots_.resize(size);
  }
  void start() {
    for (size_t k = 0; k < front_.size(); ++k) front_[k] = int64_t(k);
    ++round_;
  }
  // Swaps places `step` and `target` >= step; what `step` holds then, which no later swap moves.
  int64_t swap(int64_t step, int64_t target) {
    int64_t& other = place(target);
    const int64_t taken = other;
    other = front_[step];
    return taken;
  }

 private:
  struct Slot {
    int64_t place, content, round = 0;
  };
  int64_t& place(int64_t at) {
    if (at < int64_t(front_.size())) return front_[at];
    size_t i = mix(uint64_t(at)) & (slots_.size() - 1);
    while (slots_[i].round == round_ && slots_[i].place != at) i = (i + 1) & (slots_.size() - 1);
    if (slots_[i].round != round_) slots_[i] = {at, at, round_};
    return slots_[i].content;
  }
  std::vector<int64_t> front_;
  std::vector<Slot> slots_;
  int64_t round_ = 0;
};

// The ids that an example may draw: positions base .. base + extent - 1 without `size` of them from base + start on.
struct Pool {
  int64_t base, extent, start, size;
};

struct Labels {
  const int64_t *labels, *order, *bounds;
  int64_t classes;

  // Whether the class of an example begins and ends in `order` where `bounds` says; else they are not of one data set.
  bool consistent(int64_t id, int64_t n_data) const {
    const int64_t own = labels[id];
    if (own < 0 || own >= classes) return false;
    const int64_t begin = bounds[own], end = bounds[own + 1];
    if (begin < 0 || begin >= end || end > n_data) return false;
    const int64_t first = order[begin], last = order[end - 1];
    return std::min(first, last) >= 0 && std::max(first, last) < n_data && labels[first] == own && labels[last] == own;
  }
};

Pool pool_of(int64_t id, int64_t n_data, int64_t window, const Labels& labels_of) {
  if (labels_of.labels) {
    const int64_t own = labels_of.labels[id];
    return {0, n_data, labels_of.bounds[own], labels_of.bounds[own + 1] - labels_of.bounds[own]};
  }
  if (!window) return {0, n_data, id, 1};
  const int64_t extent = std::min(2 * window + 1, n_data);
  const int64_t base = std::min(std::max<int64_t>(id - window, 0), n_data - extent);
  return {base, extent, id - base, 1};
}

const int64_t* numbers(const std::optional<Tensor>& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

Tensor sample_negatives(const Tensor& index, int64_t count, int64_t n_data, std::optional<Tensor> labels,
                        std::optional<Tensor> order, std::optional<Tensor> bounds, const Tensor& state,
                        bool replacement, int64_t window) {
  constexpr int64_t kMost = int64_t(1) << 62;  // sums of two such numbers fit
  const Check check("sample_negatives");
  check("index", index, kI64, "[B]", {kAny});
  check.that(count > 0 && count < kMost / 8, "count", "a number > 0", count);
  check.that(n_data > 0 && n_data < kMost, "n_data", "a number > 0", n_data);
  check.that(window >= 0 && window < kMost / 2, "window", "a number >= 0", window);
  check("state", state, kI64, "[2]", {2});
  check.together("labels, order", labels.has_value(), order.has_value());
  check.together("labels, bounds", labels.has_value(), bounds.has_value());
  check("labels", labels, kI64, "[n_data]", {n_data});
  check("order", order, kI64, "[n_data]", {n_data});
  check("bounds", bounds, kI64, "[C + 1]", {kAny});
  const Tensor ids = torch::stable::contiguous(index), seed = torch::stable::contiguous(state);
  labels = contiguous(labels), order = contiguous(order), bounds = contiguous(bounds);
  const Labels labels_of = {numbers(labels), numbers(order), numbers(bounds), bounds ? bounds->numel() - 1 : 0};
  const int64_t rows = ids.size(0), *id = ids.const_data_ptr<int64_t>();
  const auto* key = reinterpret_cast<const uint64_t*>(seed.const_data_ptr<int64_t>());
  const uint64_t step = mix(mix(key[0]) + key[1]);
  Tensor out = torch::stable::new_empty(ids, {rows, count});
  int64_t* drawn = out.mutable_data_ptr<int64_t>();
  std::atomic<bool> out_of_range{false}, inconsistent{false};
  parallel_for(0, rows, grain(count * 8), [&](int64_t b, int64_t end) {
    Shuffle shuffle(replacement ? 0 : count);
    for (; b < end; ++b) {
      if (id[b] < 0 || id[b] >= n_data) {
        out_of_range = true;
        continue;
      }
      if (labels_of.labels && !labels_of.consistent(id[b], n_data)) {
        inconsistent = true;
        continue;
      }
      const Pool pool = pool_of(id[b], n_data, window, labels_of);
      const int64_t rest = pool.extent - pool.size;
      const bool repeat = replacement || rest < count;
      const uint64_t stream = mix(mix(step + uint64_t(b)) + uint64_t(id[b]));
      if (!repeat) shuffle.start();
      for (int64_t k = 0; k < count; ++k) {
        const uint64_t random = mix(stream + uint64_t(k + 1) * 0x9E3779B97F4A7C15u) & 0x7FFFFFFFFFFFFFFFu;
        int64_t at = repeat ? int64_t(random % uint64_t(std::max<int64_t>(rest, 1)))
                            : shuffle.swap(k, k + int64_t(random % uint64_t(rest - k)));
        at += pool.base + (at >= pool.start ? pool.size : 0);
        drawn[b * count + k] = std::min(at, n_data - 1);
      }
      for (int64_t k = 0; labels_of.order && k < count; ++k)  // by itself, so that its cache misses overlap
        drawn[b * count + k] = labels_of.order[drawn[b * count + k]];
    }
  });
  STD_TORCH_CHECK(!out_of_range, "index: indices must lie in [0, ", n_data, "), the n_data examples");
  STD_TORCH_CHECK(!inconsistent,
                  "labels: expected classes 0 to C - 1, the ids sorted by class, and where each class begins");
  return out;
}

// Of equal ids in a batch the last one counts.
void update_bank(const Tensor& bank, const Tensor& index, const Tensor& rows, double momentum,
                 std::optional<Tensor> scale) {
  const Check check("update_bank");
  check("bank", bank, scale ? kF8 : kFloating, "[K, D]", {kAny, kAny});
  check("index", index, kI64, "[B]", {kAny});
  check("rows", rows, kFloating, "[B, D]", {index.size(0), bank.size(1)});
  check("scale", scale, kF32, "[K]", {bank.size(0)});
  const Table& table = chosen_table();
  const Tensor ids = torch::stable::contiguous(index), x = with_contiguous_rows(rows);
  STD_TORCH_CHECK(bank.size(1) <= 1 || bank.stride(1) == 1,
                  "bank: expected contiguous rows, got gaps between their elements");
  const int to_element = element_of_bank(bank), from_element = element_of(x);
  STD_TORCH_CHECK(!scale || scale->size(0) < 2 || scale->stride(0) == 1,
                  "scale: expected a contiguous tensor, got one with gaps");
  float* factors = scale ? scale->mutable_data_ptr<float>() : nullptr;
  const int64_t count = ids.size(0), width = bank.size(1), *id = ids.const_data_ptr<int64_t>();
  std::unordered_map<int64_t, int64_t> last;
  for (int64_t b = 0; b < count; ++b) {
    STD_TORCH_CHECK(id[b] >= 0 && id[b] < bank.size(0), "index: indices must lie in [0, ", bank.size(0),
                    "), the rows of bank");
    last[id[b]] = b;
  }
  auto* to = static_cast<char*>(bank.mutable_data_ptr());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const int64_t to_bytes = bank.stride(0) * int64_t(bank.element_size());
  const int64_t from_bytes = x.stride(0) * int64_t(x.element_size());
  parallel_for(0, count, grain(width), [&](int64_t b, int64_t end) {
    std::vector<float> scratch(2 * padded_width(width));
    for (; b < end; ++b)
      if (last.find(id[b])->second == b)
        table.update_row(to + id[b] * to_bytes, to_element, factors ? factors + id[b] : nullptr, from + b * from_bytes,
                         from_element, width, momentum, scratch.data());
  });
}

}  // namespace

// z if it is set, else n_data * mean e^(<query, row> / T) of this batch, over its finite scores.
Tensor nce_partition(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& z, double temperature,
                     int64_t n_data, std::optional<Tensor> scale) {
  const Check check("nce_partition");
  check_bank(check, query, bank, scale);
  check("index", index, kI64, "[B, K]", {query.size(0), kAny});
  check("z", z, kF32, "[]", {});
  const float now = *z.const_data_ptr<float>();
  Tensor out = torch::stable::new_empty(z, {}, ScalarType::Float);
  float& partition = *out.mutable_data_ptr<float>();
  if (now > 0) return partition = now, out;
  const Table& table = chosen_table();
  const Tensor q = with_contiguous_rows(query), n = with_contiguous_rows(bank), i = torch::stable::contiguous(index);
  if (scale) scale = torch::stable::contiguous(*scale);
  const float* scales = scales_of(scale);
  const int64_t rows = i.size(0), columns = i.size(1), width = q.size(1), *chosen = i.const_data_ptr<int64_t>();
  std::vector<double> sums(rows);
  std::vector<int64_t> counts(rows);
  std::atomic<bool> out_of_range{false};
  parallel_for(0, rows, grain(columns * width), [&](int64_t b, int64_t end) {
    std::vector<float> a(padded_width(width)), x(padded_width(width));
    for (; b < end; ++b) {
      float_row(table, q, b, a.data());
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t row = chosen[b * columns + k];
        if (row < 0 || row >= n.size(0)) {
          out_of_range = true;
          continue;
        }
        float_row(table, n, row, x.data(), scales ? scales[row] : 1);
        double score = 0;
        for (int64_t d = 0; d < width; ++d) score += double(a[d]) * double(x[d]);
        if (!std::isfinite(float(score))) continue;
        sums[b] += std::exp(score / temperature), ++counts[b];
      }
    }
  });
  STD_TORCH_CHECK(!out_of_range, "index: indices must lie in [0, ", n.size(0), "), the rows of bank");
  double sum = 0;
  int64_t count = 0;
  for (int64_t b = 0; b < rows; ++b) sum += sums[b], count += counts[b];
  partition =
      float(std::min(sum / double(std::max<int64_t>(count, 1)) * double(n_data), double(3.4028234663852886e38)));
  return out;
}

}  // namespace fastkd::contrast

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("sample_negatives", TORCH_BOX(&fastkd::contrast::sample_negatives));
  m.impl("update_bank", TORCH_BOX(&fastkd::contrast::update_bank));
  m.impl("nce_partition", TORCH_BOX(&fastkd::contrast::nce_partition));
}
