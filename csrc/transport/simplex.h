// Exact transportation simplex for N, M <= 64, compiled for the host and for the device: one algorithm, no allocation.
//
//   minimise sum c_ij f_ij   with   f >= 0,   sum_j f_ij = a_i,   sum_i f_ij = b_j
//
// Duals u, v:  u_i + v_j <= c_ij  everywhere, equality where f_ij > 0; the objective is sum a u + sum b v.
//
// Masses are integers: 2^47 for the total, shifted left by 14 bits, and the low bits carry an exact perturbation: M + 1
// for every row and 1 for every column, the difference going to the heaviest column J. Cutting an arc of a spanning
// tree leaves a component without J; its net supply is |rows| (M + 1) - |columns| modulo 2^14, with |columns| < M, so
// it is never zero: no basis is degenerate, every pivot strictly lowers the cost, nothing cycles, whatever the masses
// (zeros included). The flow that is returned is recomputed from the last tree and the caller's own masses.
//
// The basis is a rooted spanning tree over rows and columns: parent, flow to the parent, and the set of nodes below as
// a pair of 64-bit sets, so that "is x above y" is one bit test and a pivot moves the potentials of a whole subtree by
// mask.
//
// Code outside the lambdas is uniform over the lanes; lambdas given to `each` run once per element, on any lane, in any
// order; lambdas given to `single` run on one lane. Everything else a machine must know is in its Lanes:
//   each(n, f) · grid(rows, columns, f) · single(f) · largest(n, f) · sum(n, f) · price(cost, rows, u, v, stride) ·
//   shift(x, n, members, by)
//
// The namespace has no name on purpose: each instruction set compiles its own copy, and the linker must not merge them.
#pragma once

#include "transport/start.h"

namespace fastkd::transport {
namespace {

// ---- the tree ------------------------------------------------------------------------------------------------------

// Potentials from the tree in its order; returns the size that rounding lets a reduced cost have by mistake.
template <class Lanes>
FASTKD_LANES double solve_tree(Lanes& lanes, Workspace& w, int root) {
  lanes.single([&] {
    w.potential[root] = 0.0;
    for (int k = w.n + w.m - 2; k >= 0; --k) {
      const int x = w.order[k], up = w.parent[x];
      const int at = x < SIDE ? x * w.stride + up - SIDE : up * w.stride + x - SIDE;
      w.potential[x] = w.cost[at] - w.potential[up];
    }
  });
  const int64_t top_u = lanes.largest(w.n, [&](int i) { return magnitude_bits(w.potential[i]); });
  const int64_t top_v = lanes.largest(w.m, [&](int j) { return magnitude_bits(w.potential[SIDE + j]); });
  return 32 * 2.220446049250313e-16 * from_bits(uint64_t(top_u > top_v ? top_u : top_v));
}

// Order by the size of the subtree: a counting sort. Returns the root.
template <class Lanes>
FASTKD_LANES int sort_tree(Lanes& lanes, Workspace& w) {
  uint8_t* const next = reinterpret_cast<uint8_t*>(w.potential);
  const int n = w.n, nodes = n + w.m;
  lanes.single([&] {
    for (int k = 0; k <= nodes; ++k) next[k] = 0;
    for (int k = 0; k < nodes; ++k) {
      const int x = k < n ? k : SIDE + k - n;
      ++next[count(w.rows_below[x]) + count(w.columns_below[x])];
    }
    for (int k = 1; k <= nodes; ++k) next[k] = uint8_t(next[k] + next[k - 1]);
    for (int k = 0; k < nodes; ++k) {
      const int x = k < n ? k : SIDE + k - n;
      w.order[--next[count(w.rows_below[x]) + count(w.columns_below[x])]] = uint8_t(x);
    }
  });
  return w.order[nodes - 1];
}

// Row i and column j enter the basis with a negative reduced cost; the arc that runs out first leaves.
FASTKD_LANES Move pivot(Workspace& w, int i, int j, double reduced) {
  int64_t theta = INT64_MAX;
  int out = ROOT, join = i;
  // The cycle loses flow on every second arc: those of rows on the way up from i, those of columns on the way up from
  // j.
  for (bool loses = true; !(w.columns_below[join] >> j & 1); join = w.parent[join], loses = !loses)
    if (loses && w.flow[join] < theta) theta = w.flow[join], out = join;
  bool below_row = true, loses = true;
  for (int x = SIDE + j; x != join; x = w.parent[x], loses = !loses)
    if (loses && w.flow[x] < theta) theta = w.flow[x], out = x, below_row = false;
  // What is below the leaving arc hangs from the other end of the entering one; the way from `inner` to it turns round.
  const int inner = below_row ? i : SIDE + j, outer = below_row ? SIDE + j : i;
  const uint64_t rows = w.rows_below[out], columns = w.columns_below[out];
  int64_t change = -theta, carried = theta;
  uint64_t rows_off = 0, columns_off = 0;
  int x = inner, above = outer;
  for (bool last = false; !last; change = -change) {
    const int up = w.parent[x];
    const int64_t flow = w.flow[x] + change;
    const uint64_t rows_here = w.rows_below[x], columns_here = w.columns_below[x];
    w.parent[x] = uint8_t(above), w.flow[x] = carried;
    w.rows_below[x] = rows & ~rows_off, w.columns_below[x] = columns & ~columns_off;
    carried = flow, rows_off = rows_here, columns_off = columns_here;
    last = x == out, above = x, x = up;
  }
  for (; x != join; x = w.parent[x], change = -change) {
    w.flow[x] += change;
    w.rows_below[x] &= ~rows, w.columns_below[x] &= ~columns;
  }
  change = -theta;
  for (x = outer; x != join; x = w.parent[x], change = -change) {
    w.flow[x] += change;
    w.rows_below[x] |= rows, w.columns_below[x] |= columns;
  }
  return Move{rows, columns, below_row ? reduced : -reduced, below_row ? -reduced : reduced};
}

// ---- the method ----------------------------------------------------------------------------------------------------

// Prices blocks of rows in turn; the most negative reduced cost of the first block that has one enters. Ends after a
// whole round without one on potentials fresh from the tree: every answer has passed its own certificate.
template <class Lanes>
FASTKD_LANES Outcome improve(Lanes& lanes, Workspace& w, int root) {
  const int n = w.n, m = w.m, limit = 1000 * (n + m);
  const int blocks = (n + Lanes::ROWS - 1) / Lanes::ROWS, rows = (n + blocks - 1) / blocks;
  double tolerance = solve_tree(lanes, w, root);
  int clean = 0, row = 0, pivots = 0, since = 0;
  while (true) {
    const int here = row + rows < n ? rows : n - row;
    const Best best = lanes.price(w.cost + row * w.stride, here, w.potential + row, w.potential + SIDE, w.stride);
    const int entering = row + best.row;
    row = row + here < n ? row + here : 0;
    if (best.value < -tolerance) {
      clean = 0;
      if (pivots == limit) return Outcome{ITERATION_LIMIT, pivots};
      Move& move = w.move;
      lanes.single([&] { move = pivot(w, entering, best.column, best.value); });
      lanes.shift(w.potential, n, move.rows, move.by_row);
      lanes.shift(w.potential + SIDE, m, move.columns, move.by_column);
      ++pivots, ++since;
    } else {
      clean += here;
    }
    if (clean < n && since < REFRESH) continue;
    if (since == 0) return Outcome{OPTIMAL, pivots};
    tolerance = solve_tree(lanes, w, sort_tree(lanes, w));
    clean = since = 0;
  }
}

template <class Lanes>
FASTKD_LANES void write_plan(Lanes& lanes, Workspace& w, double* flow, double* u, double* v, double scale) {
  const int n = w.n, m = w.m;
  lanes.each(n * m, [=](int k) { flow[k] = 0.0; });
  lanes.each(n, [&](int i) { u[i] = w.potential[i] * scale; });
  lanes.each(m, [&](int j) { v[j] = w.potential[SIDE + j] * scale; });
  lanes.single([&] {
    for (int k = 0; k < n + m - 1; ++k) {  // what the subtree has too much goes up, what it lacks comes down
      const int x = w.order[k], up = w.parent[x];
      const double amount = w.mass[x] > 0.0 ? w.mass[x] : 0.0;
      w.mass[up] -= amount;
      flow[x < SIDE ? x * m + up - SIDE : up * m + x - SIDE] = amount;
    }
  });
}

// Problem p of the batch. w.cost must hold n rows of lanes.stride(m) doubles.
template <class Cost, class Lanes>
FASTKD_LANES void solve(Lanes& lanes, Workspace& w, const Batch& batch, int64_t p) {
  const int n = batch.n, m = batch.m, stride = lanes.stride(m);
  lanes.single([&] { w.n = n, w.m = m, w.stride = stride; });
  const int exponent = load_cost(lanes, w, static_cast<const Cost*>(batch.cost) + p * n * m);
  Outcome outcome{BAD_COST, 0};
  if (exponent != NOT_FINITE) {
    const Cost* const a = static_cast<const Cost*>(batch.a) + p * n;
    const Cost* const b = static_cast<const Cost*>(batch.b) + p * m;
    outcome.status = load_masses(lanes, w, a, b);
  }
  if (outcome.status == OPTIMAL) {
    const double* const start_flow = batch.start_flow ? batch.start_flow + p * n * m : nullptr;
    const double* const start_v = batch.start_v ? batch.start_v + p * m : nullptr;
    outcome = improve(lanes, w, start(lanes, w, start_flow, start_v, power_of_two(-exponent)));
  }
  double *const flow = batch.flow + p * n * m, *const u = batch.u + p * n, *const v = batch.v + p * m;
  if (outcome.status == OPTIMAL) {
    write_plan(lanes, w, flow, u, v, power_of_two(exponent));
  } else {
    const double nan = from_bits(0x7ff8000000000000);
    lanes.each(n * m, [=](int k) { flow[k] = nan; });
    lanes.each(n, [=](int i) { u[i] = nan; });
    lanes.each(m, [=](int j) { v[j] = nan; });
  }
  lanes.single([&] {
    batch.status[p] = outcome.status;
    if (batch.pivots) batch.pivots[p] = outcome.pivots;
  });
}

}  // namespace
}  // namespace fastkd::transport
