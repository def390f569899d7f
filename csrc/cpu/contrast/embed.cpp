// The projection to the common space: v = y / |y|, y = x W^T + bias, for a batch that is small beside W. (A zero y
// stays zero.) With g the gradient of v and dy = (g - v <v, g>) / |y|:
//
//     d x = dy W,   d W = dy^T x,   d bias = sum of the rows of dy.
//
// W is read where it lies, once per product, and d W is written once; every output element belongs to one thread and is
// summed in one order.
#include "cpu/contrast/embed.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/contrast/rows.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {
namespace {

constexpr int64_t kBlock = 128;  // columns of x and W that are copied side by side: their rows lie pages apart

int64_t whole(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

void check_map(const Check& check, const Tensor& x, const Tensor& weight) {
  check("x", x, kF32, "[B, S]", {kAny, kAny});
  check("weight", weight, kF32, "[D, S]", {kAny, x.size(1)});
}

std::tuple<Tensor, Tensor> unit_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Check check("unit_linear_fwd");
  check_map(check, x, weight);
  check("bias", bias, kF32, "[D]", {weight.size(0)});
  const EmbedTable& table = chosen_embed_table();
  const Tensor a = torch::stable::contiguous(x), w = torch::stable::contiguous(weight);
  const Tensor shift = torch::stable::contiguous(bias);
  const int64_t rows = a.size(0), width = a.size(1), d = w.size(0);
  Tensor unit = torch::stable::new_empty(x, {rows, d}), length = torch::stable::new_empty(x, {rows});
  const float *from = a.const_data_ptr<float>(), *by = w.const_data_ptr<float>(), *plus = shift.const_data_ptr<float>();
  float *out = unit.mutable_data_ptr<float>(), *lengths = length.mutable_data_ptr<float>();
  constexpr int64_t kStep = 4;  // outputs that one pass over x serves
  parallel_for(0, (d + kStep - 1) / kStep, grain(rows * width), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kStep, last = std::min(end * kStep, d);
    table.dot_products(from, rows, by + first * width, last - first, width, out + first, d);
  });
  for (int64_t i = 0; i < rows; ++i, out += d) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) out[j] += plus[j], sum += double(out[j]) * double(out[j]);
    lengths[i] = float(std::sqrt(sum));
    const double scale = lengths[i] == 0 ? 1 : 1 / std::sqrt(sum);
    for (int64_t j = 0; j < d; ++j) out[j] = float(out[j] * scale);
  }
  return {unit, length};
}

// [rows, width] that begins on a page of 2 MiB, where it is that large: its page faults cost as much as the products.
// What is reserved for the alignment is never touched.
Tensor empty_on_huge_pages(const Tensor& like, int64_t rows, int64_t width) {
  constexpr int64_t kPage = int64_t(1) << 21, kFloats = kPage / 4;
  if (rows * width < kFloats) return torch::stable::new_empty(like, {rows, width});
  const Tensor whole = torch::stable::new_empty(like, {rows * width + kFloats});
  use_huge_pages(whole);
  const int64_t past = int64_t(reinterpret_cast<uintptr_t>(whole.data_ptr()) % kPage) / 4;
  Tensor flat = whole;
  flat = torch::stable::narrow(flat, 0, past ? kFloats - past : 0, rows * width);
  return torch::stable::view(flat, {rows, width});
}

// dy [rows][D], and its transpose [D][rows]; both padded with zeros to whole tiles.
struct Slopes {
  int64_t across, down;
  std::vector<float> rows, columns;
  Slopes(const Tensor& grad, const Tensor& unit, const Tensor& length, float* to_bias)
      : across(whole(unit.size(1), kEmbedRows)), down(whole(unit.size(0), kEmbedRows)) {
    const int64_t count = unit.size(0), d = unit.size(1);
    rows.resize(count * across), columns.resize(d * down);
    const Tensor upstream = torch::stable::contiguous(grad);
    const float *g = upstream.const_data_ptr<float>(), *v = unit.const_data_ptr<float>();
    std::vector<double> total(d);
    for (int64_t i = 0; i < count; ++i, g += d, v += d) {
      const double y = length.const_data_ptr<float>()[i], scale = y == 0 ? 1 : 1 / y;
      double along = 0;
      for (int64_t j = 0; j < d; ++j) along += double(g[j]) * double(v[j]);
      for (int64_t j = 0; j < d; ++j) {
        const double slope = (g[j] - along * v[j]) * scale;
        rows[i * across + j] = columns[j * down + i] = float(slope);
        total[j] += slope;
      }
    }
    std::copy(total.begin(), total.end(), to_bias);
  }
};

// One thread's columns of x and W.
struct Columns {
  const EmbedTable& table;
  const Slopes& slopes;
  const float *x, *weight;
  float *to_x, *to_weight;
  int64_t rows, d, width;
  std::vector<float> scratch;

  // `count` columns of a matrix side by side, zeros up to kBlock.
  float* gather(const float* from, int64_t lines, int64_t count, float* out) const {
    for (int64_t i = 0; i < lines; ++i) {
      std::copy_n(from + i * width, count, out + i * kBlock);
      std::fill(out + i * kBlock + count, out + (i + 1) * kBlock, 0.f);
    }
    return out;
  }

  // to [lines][width] at `column` = a^T b; through `own` [padded lines][kBlock] where whole tiles would not fit.
  void multiply(const std::vector<float>& a, int64_t stride, const float* b, int64_t k, int64_t lines, int64_t column,
                float* to, float* own) const {
    const int64_t count = std::min(kBlock, width - column);
    const bool direct = count == kBlock && lines == stride;
    float* out = direct ? to + column : own;
    for (int64_t at = 0; at < kBlock && at < count; at += kEmbedColumns)
      table.outer_products(a.data(), stride, b + at, kBlock, k, stride, out + at, direct ? width : kBlock);
    for (int64_t i = 0; !direct && i < lines; ++i) std::copy_n(own + i * kBlock, count, to + i * width + column);
  }

  void run(int64_t column) {
    const int64_t count = std::min(kBlock, width - column);
    scratch.resize((rows + d + std::max(slopes.across, slopes.down)) * kBlock + 16);
    float *of_x = aligned(scratch.data()), *of_weight = of_x + rows * kBlock, *own = of_weight + d * kBlock;
    multiply(slopes.rows, slopes.across, gather(x + column, rows, count, of_x), rows, d, column, to_weight, own);
    if (to_x)
      multiply(slopes.columns, slopes.down, gather(weight + column, d, count, of_weight), d, rows, column, to_x, own);
  }
};

std::tuple<Tensor, Tensor, Tensor> unit_linear_bwd(const Tensor& grad, const Tensor& unit, const Tensor& length,
                                                   const Tensor& x, const Tensor& weight, bool with_x) {
  const Check check("unit_linear_bwd");
  check_map(check, x, weight);
  check("grad", grad, kF32, "[B, D]", {x.size(0), weight.size(0)});
  check("unit", unit, kF32, "[B, D]", {x.size(0), weight.size(0)});
  check("length", length, kF32, "[B]", {x.size(0)});
  const Tensor a = torch::stable::contiguous(x), w = torch::stable::contiguous(weight);
  const int64_t rows = a.size(0), width = a.size(1), d = w.size(0);
  Tensor to_x = torch::stable::new_empty(x, {with_x ? rows : 0, width});
  Tensor to_weight = empty_on_huge_pages(weight, d, width), to_bias = torch::stable::new_empty(weight, {d});
  const Slopes slopes(grad, dense(unit), dense(length), to_bias.mutable_data_ptr<float>());
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  parallel_for(0, blocks, grain(kBlock * d * rows, 1 << 18), [&](int64_t block, int64_t end) {
    Columns columns = {chosen_embed_table(),
                       slopes,
                       a.const_data_ptr<float>(),
                       w.const_data_ptr<float>(),
                       with_x ? to_x.mutable_data_ptr<float>() : nullptr,
                       to_weight.mutable_data_ptr<float>(),
                       rows,
                       d,
                       width,
                       {}};
    for (; block < end; ++block) columns.run(block * kBlock);
  });
  return {to_x, to_weight, to_bias};
}

}  // namespace
}  // namespace fastkd::contrast

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("unit_linear_fwd", TORCH_BOX(&fastkd::contrast::unit_linear_fwd));
  m.impl("unit_linear_bwd", TORCH_BOX(&fastkd::contrast::unit_linear_bwd));
}
