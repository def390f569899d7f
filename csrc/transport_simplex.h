// Exact transportation simplex for N, M <= 64, compiled for the host and for the device: one algorithm, no allocation.
//
//   minimise sum c_ij f_ij   with   f >= 0,   sum_j f_ij = a_i,   sum_i f_ij = b_j
//
// Duals u, v:  u_i + v_j <= c_ij  everywhere, equality where f_ij > 0; the objective is sum a u + sum b v.
//
// Masses are integers: 2^47 for the total, shifted left by 14 bits, and the low bits carry an exact perturbation: M + 1 for
// every row and 1 for every column, the difference going to the heaviest column J. Cutting an arc of a spanning tree leaves
// a component without J; its net supply is |rows| (M + 1) - |columns| modulo 2^14, with |columns| < M, so it is never zero:
// no basis is degenerate, every pivot strictly lowers the cost, nothing cycles, whatever the masses (zeros included).
// The flow that is returned is recomputed from the last tree and the caller's own masses.
//
// The basis is a rooted spanning tree over rows and columns: parent, flow to the parent, and the set of nodes below as a
// pair of 64-bit sets, so that "is x above y" is one bit test and a pivot moves the potentials of a whole subtree by mask.
//
// Code outside the lambdas is uniform over the lanes; lambdas given to `each` run once per element, on any lane, in any
// order; lambdas given to `single` run on one lane. Everything else a machine must know is in its Lanes:
//   each(n, f) · grid(rows, columns, f) · single(f) · largest(n, f) · sum(n, f) · price(cost, rows, u, v, stride) ·
//   shift(x, n, members, by)
//
// The namespace has no name on purpose: each instruction set compiles its own copy, and the linker must not merge them.
#pragma once

#include <cstdint>
#include <cstring>

#include "transport.h"

#ifdef __CUDACC__
#define FASTKD_LANES __device__ __forceinline__
#else
#define FASTKD_LANES inline
#endif

namespace fastkd {
namespace {
namespace transport {

constexpr int SIDE = 64;   // most rows, most columns
constexpr int ROOT = 255;  // parent of the root
constexpr int SHIFT = 14;  // bits of the perturbation: 64 * 65 + 64 < 2^14
constexpr int REFRESH = 256;  // pivots between two computations of the potentials from the tree
constexpr int64_t WILD = 0x4630000000000000;  // 2^100: potentials beyond it, infinities and NaN are no hint
constexpr double TOTAL = 140737488355328.0;  // 2^47

enum Status : int { OPTIMAL = 0, BAD_COST = 1, BAD_MASS = 2, UNEQUAL_MASS = 3, ITERATION_LIMIT = 4 };

struct Best {
  double value;
  int row, column;
};

struct Move {  // what a pivot does to the potentials
  uint64_t rows, columns;
  double by_row, by_column;
};

// Nodes: row i is i, column j is SIDE + j. `cost` has n rows of `stride` doubles and is the only part that grows.
struct Workspace {
  double potential[2 * SIDE];  // u, then v, which is -inf in the padding (and, in the start, where a column is used up)
  double mass[2 * SIDE];       // of the caller, b brought to the total of a
  int64_t flow[2 * SIDE];      // to the parent; before a node has one, what is left of its mass
  uint64_t rows_below[2 * SIDE], columns_below[2 * SIDE];  // itself included
  uint8_t parent[2 * SIDE], order[2 * SIDE];               // order: children before parents
  Move move;
  double* cost;
  int n, m, stride;
};

struct Outcome {
  int status, pivots;
};

FASTKD_LANES double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
FASTKD_LANES int64_t magnitude_bits(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits & 0x7fffffffffffffff;
}
FASTKD_LANES double power_of_two(int e) { return from_bits(uint64_t(e + 1023) << 52); }
FASTKD_LANES double infinity() { return from_bits(0x7ff0000000000000); }

// ---- reading the problem -------------------------------------------------------------------------------------------

// Costs are scaled by a power of two, so that potentials overflow at no scale. Returns its exponent, or NOT_FINITE.
constexpr int NOT_FINITE = -9999;

template <class Lanes, class Cost>
FASTKD_LANES int load_cost(Lanes& lanes, Workspace& w, const Cost* cost) {
  const int64_t top = lanes.largest(w.n * w.m, [&](int k) { return magnitude_bits(double(cost[k])); });
  if (top >= 0x7ff0000000000000) return NOT_FINITE;
  int exponent = int(top >> 52) - 1023;
  exponent = top == 0 ? 0 : exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
  const double scale = power_of_two(-exponent);
  const int m = w.m, stride = w.stride;
  double* const to = w.cost;
  lanes.grid(w.n, m, [=](int i, int j) { to[i * stride + j] = double(cost[i * m + j]) * scale; });
  return exponent;
}

template <class Lanes, class Cost>
FASTKD_LANES int load_masses(Lanes& lanes, Workspace& w, const Cost* a, const Cost* b) {
  const int n = w.n, m = w.m;
  const int64_t worst_a = lanes.largest(n, [=](int i) { return int64_t(!(double(a[i]) >= 0.0)); });
  const int64_t worst_b = lanes.largest(m, [=](int j) { return int64_t(!(double(b[j]) >= 0.0)); });
  const double total_a = lanes.sum(n, [=](int i) { return double(a[i]); });
  const double total_b = lanes.sum(m, [=](int j) { return double(b[j]); });
  if (worst_a | worst_b || !(total_a + total_b < infinity())) return BAD_MASS;
  const double larger = total_a > total_b ? total_a : total_b, smaller = total_a > total_b ? total_b : total_a;
  if (larger - smaller > larger * (sizeof(Cost) == 8 ? 1e-6 : 1e-5)) return UNEQUAL_MASS;
  const double by_a = total_a > 0 ? total_a : 1.0, by_b = total_b > 0 ? total_b : 1.0, level = by_a / by_b;
  double* const mass = w.mass;
  int64_t* const left = w.flow;
  lanes.each(n, [=](int i) {
    mass[i] = double(a[i]);
    left[i] = (int64_t(mass[i] / by_a * TOTAL) << SHIFT) + m + 1;
  });
  lanes.each(m, [=](int j) {
    mass[SIDE + j] = double(b[j]) * level;
    left[SIDE + j] = (int64_t(double(b[j]) / by_b * TOTAL) << SHIFT) + 1;
  });
  lanes.single([=] {
    int64_t difference = 0, heaviest = 0;
    int at = 0;
    for (int i = 0; i < n; ++i) difference += left[i];
    for (int j = 0; j < m; ++j) {
      difference -= left[SIDE + j];
      if (left[SIDE + j] > heaviest) heaviest = left[SIDE + j], at = j;
    }
    left[SIDE + at] += difference;
  });
  return OPTIMAL;
}

// ---- the tree ------------------------------------------------------------------------------------------------------

// The node x is used up: what it had left flows to `up`, until a pivot says otherwise. Children come before parents.
FASTKD_LANES void hang(Workspace& w, int x, int up, int step) {
  w.parent[x] = uint8_t(up);
  w.flow[up] -= w.flow[x];
  w.rows_below[up] |= w.rows_below[x];
  w.columns_below[up] |= w.columns_below[x];
  w.order[step] = uint8_t(x);
}

// The adjacent 2x2 minors of a Monge matrix are all <= 0: the north-west corner is then optimal, and a good start nearby.
template <class Lanes>
FASTKD_LANES bool nearly_monge(Lanes& lanes, const Workspace& w) {
  const int n = w.n, m = w.m, cells = n < m ? n : m, stride = w.stride;
  if (cells < 3) return false;
  const double* const cost = w.cost;
  const double wrong = lanes.sum(cells - 1, [=](int k) {
    const double* c = cost + k * stride + k * (m - 1) / cells;
    return c[0] + c[stride + 1] > c[1] + c[stride] ? 1.0 : 0.0;
  });
  return wrong * 5 <= cells - 1;
}

// Row after row, into the column that is cheapest (after the columns' potentials) among those with mass left.
template <class Lanes>
FASTKD_LANES void start(Lanes& lanes, Workspace& w, const double* start_v, double scale) {
  const int n = w.n, m = w.m;
  const bool corner = !start_v && nearly_monge(lanes, w);
  lanes.each(n, [&](int i) {
    w.potential[i] = 0.0;
    w.rows_below[i] = 1ull << i;
    w.columns_below[i] = 0;
  });
  double* const v = w.potential + SIDE;
  const double* const cost = w.cost;
  const int stride = w.stride;
  lanes.each(SIDE, [=](int j) {
    v[j] = j >= m ? -infinity() : !start_v ? cost[j] : magnitude_bits(start_v[j] * scale) < WILD ? start_v[j] * scale : 0.0;
  });
  for (int i = 1; i < n && !start_v && !corner; ++i)
    lanes.each(m, [=](int j) { v[j] = cost[i * stride + j] < v[j] ? cost[i * stride + j] : v[j]; });
  lanes.each(m, [&](int j) {
    w.rows_below[SIDE + j] = 0;
    w.columns_below[SIDE + j] = 1ull << j;
  });
  for (int step = 0, row = 0, column = 0; step < n + m - 1; ++step) {
    if (!corner) column = lanes.price(w.cost + row * w.stride, 1, w.potential, w.potential + SIDE, w.stride).column;
    const bool row_ends = w.flow[row] < w.flow[SIDE + column];
    lanes.single([&] {
      if (row_ends) return hang(w, row, SIDE + column, step);
      hang(w, SIDE + column, row, step);
      w.potential[SIDE + column] = -infinity();
    });
    if (row_ends) ++row;
    else if (corner) ++column;
  }
  lanes.single([&] { w.parent[n - 1] = ROOT; });
}

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

FASTKD_LANES int count(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
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
  // The cycle loses flow on every second arc: those of rows on the way up from i, those of columns on the way up from j.
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

// Prices blocks of rows in turn; the most negative reduced cost of the first block that has one enters. Ends after a whole
// round without one on potentials fresh from the tree: every answer has passed its own certificate.
template <class Lanes>
FASTKD_LANES Outcome improve(Lanes& lanes, Workspace& w) {
  const int n = w.n, m = w.m, limit = 1000 * (n + m);
  const int blocks = (n + Lanes::ROWS - 1) / Lanes::ROWS, rows = (n + blocks - 1) / blocks;
  double tolerance = solve_tree(lanes, w, n - 1);
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
FASTKD_LANES void solve(Lanes& lanes, Workspace& w, const TransportBatch& batch, int64_t p) {
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
    start(lanes, w, batch.start_v ? batch.start_v + p * m : nullptr, power_of_two(-exponent));
    outcome = improve(lanes, w);
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

}  // namespace transport
}  // namespace
}  // namespace fastkd
