// What transport/simplex.h works on, how a problem is read into it, and the tree it starts from.
#pragma once

#include <cstdint>
#include <cstring>

#include "transport/transport.h"

#ifdef __CUDACC__
#define FASTKD_LANES __device__ __forceinline__
#else
#define FASTKD_LANES inline
#endif

namespace fastkd::transport {
namespace {

constexpr int SIDE = 64;                      // most rows, most columns
constexpr int ROOT = 255;                     // parent of the root
constexpr int SHIFT = 14;                     // bits of the perturbation: 64 * 65 + 64 < 2^14
constexpr int REFRESH = 256;                  // pivots between two computations of the potentials from the tree
constexpr int64_t WILD = 0x4630000000000000;  // 2^100: potentials beyond it, infinities and NaN are no hint
constexpr double TOTAL = 140737488355328.0;   // 2^47

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
  uint64_t near[2 * SIDE];                                 // warm start: partners of a node not yet in the tree
  uint8_t parent[2 * SIDE], order[2 * SIDE];               // order: children before parents
  Move move;
  uint64_t rows_left;  // in the start: rows not yet in the tree
  int steps;           // in the start: nodes in the tree
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

FASTKD_LANES int count(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

FASTKD_LANES int lowest(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(bits)) - 1;
#else
  return __builtin_ctzll(bits);
#endif
}

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
  if (larger - smaller > 1e-5 * larger) return UNEQUAL_MASS;
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

// ---- the first tree ------------------------------------------------------------------------------------------------

// The node x is used up: what it had left flows to `up`, until a pivot says otherwise. Children come before parents.
FASTKD_LANES void hang(Workspace& w, int x, int up) {
  w.parent[x] = uint8_t(up);
  w.flow[up] -= w.flow[x];
  w.rows_below[up] |= w.rows_below[x];
  w.columns_below[up] |= w.columns_below[x];
  w.order[w.steps++] = uint8_t(x);
  if (x < SIDE) {
    w.rows_left &= ~(1ull << x);
  } else {
    w.potential[x] = -infinity();
  }
}

// The adjacent 2x2 minors of a Monge matrix are all <= 0: the north-west corner is then optimal, and a good start
// nearby.
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

// The flow of an earlier problem, taken again as far as these masses allow: its arcs are a forest, whose leaves have no
// choice. Without them (or if it is no forest) the rows that are left go the ordinary way.
template <class Lanes>
FASTKD_LANES void start_from_flow(Lanes& lanes, Workspace& w, const double* flow) {
  const int n = w.n, m = w.m;
  lanes.each(n, [&](int i) {
    uint64_t partners = 0;
    for (int j = 0; j < m; ++j) partners |= uint64_t(flow[i * m + j] > 0.0) << j;
    w.near[i] = partners;
  });
  lanes.each(m, [&](int j) {
    uint64_t partners = 0;
    for (int i = 0; i < n; ++i) partners |= uint64_t(flow[i * m + j] > 0.0) << i;
    w.near[SIDE + j] = partners;
  });
  lanes.single([&] {
    uint64_t rows = 0, columns = 0;  // the leaves
    for (int i = 0; i < n; ++i) rows |= uint64_t(count(w.near[i]) == 1) << i;
    for (int j = 0; j < m; ++j) columns |= uint64_t(count(w.near[SIDE + j]) == 1) << j;
    while (rows | columns) {
      const int leaf = rows ? lowest(rows) : SIDE + lowest(columns);
      if (rows)
        rows &= rows - 1;
      else
        columns &= columns - 1;
      if (!w.near[leaf]) continue;
      const int other = (leaf < SIDE ? SIDE : 0) + lowest(w.near[leaf]);
      const int row = leaf < SIDE ? leaf : other, column = leaf < SIDE ? other : leaf;
      const int ends = w.flow[row] < w.flow[column] ? row : column, stays = row + column - ends;
      hang(w, ends, stays);
      for (uint64_t rest = w.near[ends]; rest; rest &= rest - 1) {
        const int z = (ends < SIDE ? SIDE : 0) + lowest(rest);
        w.near[z] &= ~(1ull << ends % SIDE);
        if (count(w.near[z]) == 1) (z < SIDE ? rows : columns) |= 1ull << z % SIDE;
      }
      w.near[ends] = 0;
    }
  });
}

// Row after row, into the column that is cheapest (after the columns' potentials) among those with mass left. What is
// left weighs the same on both sides, so while two nodes are left, one of them is a row; a row is the root, returned.
template <class Lanes>
FASTKD_LANES int start(Lanes& lanes, Workspace& w, const double* start_flow, const double* start_v, double scale) {
  const int n = w.n, m = w.m, stride = w.stride;
  const bool corner = !start_flow && !start_v && nearly_monge(lanes, w);
  double* const v = w.potential + SIDE;
  const double* const cost = w.cost;
  lanes.each(n, [&](int i) {
    w.potential[i] = 0.0;
    w.rows_below[i] = 1ull << i;
    w.columns_below[i] = 0;
  });
  lanes.each(SIDE, [=](int j) {
    const double hint = start_v && j < m ? start_v[j] * scale : 0.0;
    v[j] = j >= m ? -infinity() : !start_v ? cost[j] : magnitude_bits(hint) < WILD ? hint : 0.0;
  });
  for (int i = 1; i < n && !start_v && !corner; ++i)
    lanes.each(m, [=](int j) { v[j] = cost[i * stride + j] < v[j] ? cost[i * stride + j] : v[j]; });
  lanes.each(m, [&](int j) {
    w.rows_below[SIDE + j] = 0;
    w.columns_below[SIDE + j] = 1ull << j;
  });
  lanes.single([&] {
    w.rows_left = n == SIDE ? ~0ull : (1ull << n) - 1;
    w.steps = 0;
  });
  if (start_flow) start_from_flow(lanes, w, start_flow);
  int row = lowest(w.rows_left), column = 0;
  for (int step = w.steps; step < n + m - 1; ++step) {
    if (!corner) column = lanes.price(cost + row * stride, 1, w.potential, v, stride).column;
    const bool row_ends = w.flow[row] < w.flow[SIDE + column];
    lanes.single([&] { row_ends ? hang(w, row, SIDE + column) : hang(w, SIDE + column, row); });
    if (row_ends)
      row = lowest(w.rows_left);
    else if (corner)
      ++column;
  }
  lanes.single([&] { w.parent[row] = ROOT; });
  return row;
}

}  // namespace
}  // namespace fastkd::transport
