// InfoNCE against a bank that the batch shares: attention with K = V = bank. One pass over the bank gives the loss and
// the gradient of the query:
//
//     lse = log sum_k e^n_k,  loss = softplus(lse - p),  w = sigmoid(lse - p),
//     d loss / d query = w (sum_k softmax(n)_k bank_k - positive) / T.
//
// The bank is cut into ranges and each range into blocks that stay in L2 while scores, softmax and weighted sum are
// formed. How it is cut depends on sizes alone, and ranges are merged in order: bitwise the same for any number of
// threads. Nothing grows with K beyond kTasks ranges.
//
// A bfloat16 bank is multiplied on bfloat16 units where there are some; a float32 query and its weights are then split
// into two bfloat16 parts each, so that float32 callers keep 16 bits.
#include "cpu/contrast/op.h"

#include <algorithm>
#include <tuple>

#include "cpu/contrast/rows.h"
#include "cpu/gemm/gemm.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_gathered(const Tensor& query, const Tensor& positive,
                                                             const Tensor& bank, const Tensor& index,
                                                             const std::optional<Tensor>& query_ids,
                                                             const std::optional<Tensor>& bank_ids,
                                                             const std::optional<Tensor>& scale,
                                                             double inverse_temperature, bool gradient_in_forward);

namespace {

constexpr int64_t kTasks = 32;            // independent pieces of work: range of the bank x group of panels
constexpr int64_t kGroup = 4;             // panels that share one reading of a block
constexpr int64_t kBlockBytes = 1 << 17;  // of the bank in L2
constexpr int64_t kMaxKeys = 256, kLeastBlocks = 8;

// Everything that depends on sizes, dtypes and the machine.
struct Plan {
  const Table& table;
  const Gemm& gemm;
  bool bfloat16, in_place, split_query, split_weights, gradient_in_forward;
  int64_t queries, width, padded, bank_rows, panels, keys, blocks, groups, ranges, packed_bytes;
  int element;
  int64_t row_bytes, row_stride;  // of the bank

  Plan(const Tensor& query, const Tensor& bank, bool scaled, bool gradient_in_forward)
      : table(chosen_table()),
        gemm(fastkd::gemm(scaled ? int(kFloat32) : element_of(bank))),
        gradient_in_forward(gradient_in_forward) {
    element = element_of_bank(bank);
    queries = query.size(0), width = query.size(1), padded = padded_width(width), bank_rows = bank.size(0);
    bfloat16 = gemm.operand == kBFloat16;
    row_stride = bank.stride(0), row_bytes = row_stride * int64_t(bank.element_size());
    in_place = width == padded && element == gemm.operand && !scaled;
    split_query = bfloat16 && element_of(query) != kBFloat16;
    split_weights = split_query;
    const int64_t fit = kBlockBytes / (padded * (bfloat16 ? 2 : 4)) / kPanel * kPanel;
    keys = std::min(std::max(fit, kPanel), kMaxKeys);
    panels = (queries + kPanel - 1) / kPanel;
    blocks = (bank_rows + keys - 1) / keys;
    groups = (panels + kGroup - 1) / kGroup;
    ranges = std::max<int64_t>(1, std::min(kTasks / std::max<int64_t>(groups, 1), blocks / kLeastBlocks));
    packed_bytes = (gemm.bytes_b(kPanel, width) + 63) / 64 * 64;
  }
  int64_t in_panel(int64_t panel) const { return std::min(kPanel, queries - panel * kPanel); }
};

// What the ranges found: per range and panel a PanelState and [kPanel][padded] sums.
struct Partials {
  Tensor sums, states;
  int64_t panels, size;
  Partials(const Tensor& like, const Plan& plan) : panels(plan.panels), size(kPanel * plan.padded) {
    const int64_t count = plan.ranges * panels;
    sums = torch::stable::new_empty(like, {plan.gradient_in_forward ? count * size : 0}, ScalarType::Float);
    states = torch::stable::new_empty(like, {count * int64_t(sizeof(PanelState) / 8)}, ScalarType::Double);
  }
  float* sum(int64_t range, int64_t panel) const {
    return sums.mutable_data_ptr<float>() + (range * panels + panel) * size;
  }
  PanelState* state(int64_t range, int64_t panel) const {
    return reinterpret_cast<PanelState*>(states.mutable_data_ptr<double>()) + range * panels + panel;
  }
};

// The queries, packed panel after panel; a second set holds what rounding to bfloat16 left over.
struct PackedQueries {
  Scratch scratch;
  char *high, *low;
  PackedQueries(const Plan& plan, const Tensor& query, const Tensor& as_float)
      : scratch(query, plan.panels * plan.packed_bytes * (plan.split_query ? 2 : 1)),
        high(scratch.get()),
        low(plan.split_query ? high + plan.panels * plan.packed_bytes : nullptr) {
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      const float* rows = as_float.const_data_ptr<float>() + panel * kPanel * plan.padded;
      GemmSource source = {rows, kFloat32, plan.padded, 1, plan.in_panel(panel), plan.width};
      plan.gemm.pack_b(source, high + panel * plan.packed_bytes);
      source.element = kGemmLowPart;
      if (low) plan.gemm.pack_b(source, low + panel * plan.packed_bytes);
    }
  }
};

// One thread's share: a range of the bank against a group of panels.
struct Task {
  const Plan& plan;
  const PackedQueries& packed;
  const Partials& partials;
  const char* bank;
  const int64_t *query_ids, *bank_ids;
  const float* scales;
  float alpha;
  std::vector<char> scratch;
  float *scores, *own_block;
  uint32_t *high, *low;

  Task(const Plan& plan, const PackedQueries& packed, const Partials& partials, const Tensor& bank,
       const int64_t* query_ids, const int64_t* bank_ids, const float* scales, double alpha)
      : plan(plan),
        packed(packed),
        partials(partials),
        bank(static_cast<const char*>(bank.const_data_ptr())),
        query_ids(query_ids),
        bank_ids(bank_ids),
        scales(scales),
        alpha(float(alpha)) {
    const int64_t tile = plan.keys * kPanel, block = plan.in_place ? 0 : plan.keys * plan.padded;
    scratch.resize((2 * tile + block) * 4 + 64);
    scores = reinterpret_cast<float*>(aligned(scratch.data()));
    high = reinterpret_cast<uint32_t*>(scores + tile), low = high + tile / 2;
    own_block = reinterpret_cast<float*>(low + tile / 2);
    std::fill(scores, scores + tile, 0.f);  // lanes without a query
  }

  void run(int64_t range, int64_t group) {
    const int64_t first = group * kGroup, last = std::min(plan.panels, first + kGroup);
    for (int64_t panel = first; panel < last; ++panel) {
      PanelState* state = partials.state(range, panel);
      std::fill(state->largest, state->largest + kPanel, -INFINITY);
      std::fill(state->sum, state->sum + kPanel, 0.);
      if (plan.gradient_in_forward) std::fill_n(partials.sum(range, panel), kPanel * plan.padded, 0.f);
    }
    const int64_t begin = range * plan.blocks / plan.ranges, end = (range + 1) * plan.blocks / plan.ranges;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t key = b * plan.keys, keys = std::min(plan.keys, plan.bank_rows - key);
      const void* rows = block(key, keys);
      for (int64_t panel = first; panel < last; ++panel)
        score_panel(rows, key, keys, panel, range, panel == first && b + 1 < end);
    }
  }

  // The rows as they are multiplied: where they lie, or widened (and padded) into memory of our own.
  const void* block(int64_t key, int64_t keys) {
    const char* rows = bank + key * plan.row_bytes;
    if (plan.in_place) return rows;
    if (!plan.bfloat16)
      for (int64_t j = 0; j < keys; ++j)
        plan.table.to_float32(rows + j * plan.row_bytes, plan.element, plan.width, plan.padded,
                              scales ? scales[key + j] : 1, own_block + j * plan.padded);
    else
      for (int64_t j = 0; j < keys; ++j) {
        auto* row = reinterpret_cast<uint16_t*>(own_block) + j * plan.padded;
        std::copy_n(reinterpret_cast<const uint16_t*>(rows + j * plan.row_bytes), plan.width, row);
        std::fill(row + plan.width, row + plan.padded, uint16_t(0));
      }
    return own_block;
  }

  void score_panel(const void* rows, int64_t key, int64_t keys, int64_t panel, int64_t range, bool ahead) {
    const int64_t queries = plan.in_panel(panel), stride = plan.in_place ? plan.row_stride : plan.padded;
    const GemmShape shape = {keys, queries, plan.width};
    GemmOut out = {scores, kPanel, alpha, false};
    plan.gemm.tile_direct(rows, stride, packed.high + panel * plan.packed_bytes, shape, out);
    out.accumulate = true;
    if (packed.low) plan.gemm.tile_direct(rows, stride, packed.low + panel * plan.packed_bytes, shape, out);
    if (bank_ids) plan.table.exclude_ids(scores, keys, queries, query_ids + panel * kPanel, bank_ids + key);
    PanelState* state = partials.state(range, panel);
    const bool units = plan.bfloat16 && plan.gradient_in_forward;
    uint32_t* rest = units && plan.split_weights ? low : nullptr;
    plan.table.softmax_weights(scores, keys, queries, state, units ? high : nullptr, rest);
    if (!plan.gradient_in_forward) return;
    float* sum = partials.sum(range, panel);
    ahead = ahead && plan.in_place;
    if (units)
      plan.table.weighted_sum_bfloat16(high, rest, static_cast<const uint16_t*>(rows), stride, keys, queries,
                                       plan.padded, state->shrink, sum, ahead);
    else
      plan.table.weighted_sum(scores, static_cast<const float*>(rows), stride, keys, queries, plan.padded,
                              state->shrink, sum, ahead);
  }
};

// The ranges of query i, in order.
void merge(const Plan& plan, const Partials& partials, int64_t i, double* largest, double* mass, float* mean) {
  const int64_t panel = i / kPanel, lane = i % kPanel;
  *largest = -INFINITY, *mass = 0;
  for (int64_t r = 0; r < plan.ranges; ++r) {
    const double top = partials.state(r, panel)->largest[lane];
    *largest = *largest >= top ? *largest : top;  // NaN counts as the largest
  }
  const double shift = *largest == -INFINITY ? 0 : *largest;
  std::fill_n(mean, plan.padded, 0.f);
  for (int64_t r = 0; r < plan.ranges; ++r) {
    const PanelState* state = partials.state(r, panel);
    const double scale = std::exp(state->largest[lane] - shift);
    *mass += scale * state->sum[lane];
    if (plan.gradient_in_forward)
      plan.table.add_scaled_row(partials.sum(r, panel) + lane * plan.padded, float(scale), plan.padded, mean);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_shared(const Tensor& query, const Tensor& positive,
                                                           const Tensor& bank, const std::optional<Tensor>& query_ids,
                                                           const std::optional<Tensor>& bank_ids,
                                                           const std::optional<Tensor>& scale,
                                                           double inverse_temperature, bool gradient_in_forward) {
  const Plan plan(query, bank, scale.has_value(), gradient_in_forward);
  Tensor loss = torch::stable::new_empty(query, {plan.queries}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(query, {plan.queries}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(query, {plan.queries}, ScalarType::Float);
  Tensor unit_grad =
      torch::stable::new_empty(query, {gradient_in_forward ? plan.queries : 0, plan.width}, ScalarType::Float);
  Tensor floats = torch::stable::new_empty(query, {plan.queries, plan.padded}, ScalarType::Float);
  for (int64_t i = 0; i < plan.queries; ++i)
    float_row(plan.table, query, i, floats.mutable_data_ptr<float>() + i * plan.padded);
  const PackedQueries packed(plan, query, floats);
  const Partials partials(query, plan);
  const int64_t* of_queries = query_ids ? query_ids->const_data_ptr<int64_t>() : nullptr;
  const int64_t* of_bank = bank_ids ? bank_ids->const_data_ptr<int64_t>() : nullptr;
  const int64_t tasks = plan.ranges * plan.groups, work = plan.keys * plan.padded * kPanel;
  parallel_for(0, tasks, grain(plan.blocks * work / std::max<int64_t>(tasks, 1), 1 << 20), [&](int64_t t, int64_t end) {
    Task task(plan, packed, partials, bank, of_queries, of_bank, scales_of(scale), inverse_temperature);
    for (; t < end; ++t) task.run(t % plan.ranges, t / plan.ranges);
  });
  float *losses = loss.mutable_data_ptr<float>(), *weights = weight.mutable_data_ptr<float>(),
        *lses = lse.mutable_data_ptr<float>();
  float* unit_grads = unit_grad.mutable_data_ptr<float>();
  parallel_for(0, plan.queries, grain(plan.padded * plan.ranges), [&](int64_t i, int64_t end) {
    std::vector<float> wanted(plan.padded), mean(plan.padded);
    for (; i < end; ++i) {
      double largest, mass;
      merge(plan, partials, i, &largest, &mass, mean.data());
      float_row(plan.table, positive, i, wanted.data());
      finish_row(floats.const_data_ptr<float>() + i * plan.padded, wanted.data(), plan.width, inverse_temperature,
                 largest, mass, mean.data(),
                 {losses + i, weights + i, lses + i, gradient_in_forward ? unit_grads + i * plan.width : nullptr});
    }
  });
  return {loss, unit_grad, weight, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_fwd(const Tensor& query, const Tensor& positive, const Tensor& bank,
                                                        std::optional<Tensor> index, const Tensor& inverse_temperature,
                                                        std::optional<Tensor> query_ids, std::optional<Tensor> bank_ids,
                                                        bool gradient_in_forward, std::optional<Tensor> scale) {
  const Check check("info_nce_fwd");
  check_bank(check, query, bank, scale);
  check("positive", positive, kFloating, "[B, D]", {query.size(0), query.size(1)});
  check("index", index, kI64, "[B, K]", {query.size(0), kAny});
  check("inverse_temperature", inverse_temperature, kF64, "[]", {});
  check_ids(check, query, bank, query_ids, bank_ids);
  const Tensor q = with_contiguous_rows(query), p = with_contiguous_rows(positive), n = with_contiguous_rows(bank);
  if (query_ids) query_ids = torch::stable::contiguous(*query_ids);
  if (bank_ids) bank_ids = torch::stable::contiguous(*bank_ids);
  if (scale) scale = torch::stable::contiguous(*scale);
  const double inverse = *inverse_temperature.const_data_ptr<double>();
  if (index)
    return info_nce_gathered(q, p, n, torch::stable::contiguous(*index), query_ids, bank_ids, scale, inverse,
                             gradient_in_forward);
  return info_nce_shared(q, p, n, query_ids, bank_ids, scale, inverse, gradient_in_forward);
}

}  // namespace
}  // namespace fastkd::contrast

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // index [B, K'] or all of the bank; ids [B] and [K]: equal ones are dropped; scale [K] of the rows. Loss rows [B];
  // the gradient of the query times the temperature [B, D] (no rows unless asked for); the weight of the positive [B];
  // log sum e^score of the negatives [B].
  m.def(
      "info_nce_fwd(Tensor query, Tensor positive, Tensor bank, Tensor? index, Tensor inverse_temperature, "
      "Tensor? query_ids, Tensor? bank_ids, bool gradient_in_forward, Tensor? scale=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // scores: query bank^T, replaced by the loss's derivative with respect to the scores over T. Loss rows [B]; the
  // weight of the positive [B].
  m.def(
      "info_nce_softmax(Tensor(a!) scores, Tensor query, Tensor positive, Tensor inverse_temperature, "
      "Tensor? query_ids, Tensor? bank_ids) -> (Tensor, Tensor)");
  // The positive in column 0 of index; shift is what is taken off every score. Rows [B] and the gradient of the query.
  m.def(
      "nce_fwd(Tensor query, Tensor bank, Tensor index, Tensor shift, float temperature, bool gradient_in_forward, "
      "Tensor? scale=None) -> (Tensor, Tensor)");
  // Both anchors at once: half the sum of their rows [B], the gradients of both queries, z of both from now on.
  m.def(
      "nce_pair(Tensor query_a, Tensor query_b, Tensor bank_a, Tensor bank_b, Tensor index, Tensor z_a, Tensor z_b, "
      "float noise, float temperature, int n_data) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x W^T + bias on the unit sphere [B, D], and the lengths that it had [B]; then the gradients of x (no rows of it
  // unless with_x), W and bias.
  m.def("unit_linear_fwd(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  m.def(
      "unit_linear_bwd(Tensor grad, Tensor unit, Tensor length, Tensor x, Tensor weight, bool with_x) -> "
      "(Tensor, Tensor, Tensor)");
  // Negatives of other labels (class-sorted ids in order and bounds), or within a window, or all others: [B, count].
  m.def(
      "sample_negatives(Tensor index, int count, int n_data, Tensor? labels, Tensor? order, Tensor? bounds, "
      "Tensor state, bool replacement, int window) -> Tensor");
  // scale [K]: of a float8 bank's rows, which it moves with.
  m.def("update_bank(Tensor(a!) bank, Tensor index, Tensor rows, float momentum, Tensor(b!)? scale=None) -> ()");
  // z if it is set, else n_data times the mean of e^score of this batch.
  m.def(
      "nce_partition(Tensor query, Tensor bank, Tensor index, Tensor z, float temperature, int n_data, "
      "Tensor? scale=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("info_nce_fwd", TORCH_BOX(&fastkd::contrast::info_nce_fwd)); }
