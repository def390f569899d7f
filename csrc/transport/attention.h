// Cost attention (BERT-EMD): after its transport is solved, a layer's weight moves towards the layers that are cheap to
// match. Run by the lanes that solved, in the same launch; csrc/transport/simplex.h says what lanes are.
#pragma once

#include <cmath>

#include "transport/simplex.h"

namespace fastkd::transport {
namespace {

constexpr double SMALLEST_UNIT = 1.4916681462400413e-154;  // inert: keeps ratios finite
constexpr double SMALLEST_WEIGHT = 1e-8;                   // a weight of 0 would be 0/0 in the next step

template <class Lanes>
FASTKD_LANES void divide(Lanes& lanes, double* x, int count, double by) {
  lanes.each(count, [=](int i) { x[i] /= by; });
}

template <class Lanes>
FASTKD_LANES double total(Lanes& lanes, const double* x, int count) {
  return lanes.sum(count, [=](int i) { return x[i]; });
}

// Of numbers >= 0.
template <class Lanes>
FASTKD_LANES void softmax(Lanes& lanes, double* x, int count, double temperature) {
  const double top = from_bits(uint64_t(lanes.largest(count, [=](int i) { return magnitude_bits(x[i]); })));
  lanes.each(count, [=](int i) { x[i] = ::exp((x[i] - top) / temperature); });
  divide(lanes, x, count, total(lanes, x, count));
}

// The new weights of one side of problem p: the cheaper a layer's unit of mass, the heavier.
template <class Cost, class Lanes>
FASTKD_LANES void move_side(Lanes& lanes, const Batch& batch, int64_t p, bool rows, double* out) {
  const CostAttention& how = batch.attention;
  const int count = rows ? batch.n : batch.m, others = rows ? batch.m : batch.n;
  const int step = rows ? 1 : batch.m, stride = rows ? batch.m : 1;
  const Cost* const cost = static_cast<const Cost*>(batch.cost) + p * batch.n * batch.m;
  const double* const flow = batch.flow + p * batch.n * batch.m;
  const Cost* const weight = static_cast<const Cost*>(rows ? batch.a : batch.b) + p * count;
  lanes.each(count, [&](int i) {
    double spent = 0, flows = 0, costs = 0;
    for (int j = 0; j < others; ++j) {
      const double f = flow[i * stride + j * step], c = double(cost[i * stride + j * step]);
      spent += f * c, flows += f, costs += c;
    }
    out[i] = (how.product_of_sums ? flows * costs : spent) / double(weight[i]);
  });
  const double all = total(lanes, out, count);
  lanes.each(count, [=](int i) {
    const double unit = out[i];
    out[i] = unit == 0 ? 0 : all / (unit < SMALLEST_UNIT ? SMALLEST_UNIT : unit);
  });
  if (!how.inverse_cost) return softmax(lanes, out, count, how.temperature);
  const double ratios = total(lanes, out, count);
  divide(lanes, out, count, ratios < SMALLEST_UNIT ? SMALLEST_UNIT : ratios);
}

// All weights of `problems` kinds of cost, after every one of them was solved.
template <class Cost, class Lanes>
FASTKD_LANES void move_weights(Lanes& lanes, const Batch& batch, int64_t problems) {
  const CostAttention& how = batch.attention;
  for (int side = 0; side < 2; ++side) {
    const bool rows = side == 0;
    const int count = rows ? batch.n : batch.m;
    double* const moved = rows ? how.rows : how.columns;
    const Cost* const old = static_cast<const Cost*>(rows ? batch.a : batch.b);
    for (int64_t p = 0; p < problems; ++p) move_side<Cost>(lanes, batch, p, rows, moved + p * count);
    if (how.joint)
      lanes.each(count, [=](int i) {
        double mean = 0;
        for (int64_t p = 0; p < problems; ++p) mean += moved[p * count + i];
        for (int64_t p = 0; p < problems; ++p) moved[p * count + i] = mean / double(problems);
      });
    for (int64_t p = 0; p < problems; ++p) {
      double* const x = moved + p * count;
      if (how.double_softmax) softmax(lanes, x, count, 1.0);
      const double sum = total(lanes, x, count);
      const bool finite = sum - sum == 0;  // a step that overflowed must not leave NaN in the state
      lanes.each(count, [=](int i) {
        if (!finite) x[i] = double(old[p * count + i]);
        if (x[i] < SMALLEST_WEIGHT) x[i] = SMALLEST_WEIGHT;
      });
      divide(lanes, x, count, total(lanes, x, count));
    }
  }
}

}  // namespace
}  // namespace fastkd::transport
