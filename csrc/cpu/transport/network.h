// The transportation simplex for the host, of any size; transport/simplex.h has the problem and is faster up to 64
// x 64.
//
// The basis is a rooted spanning tree over rows and columns: each node knows its parent, its first child and its
// siblings. A pivot reverses the path from the entering arc to the leaving one and hangs what is below it elsewhere.
//
// Masses are integers: 2^60 for the total, and one more for every column, so that each column has mass. The tree is
// strongly feasible (Cunningham, 1976): an arc without flow points to the root. It starts so, and stays so because of
// the arcs that run out the last one on the cycle leaves, seen from its apex in the direction of the entering arc.
// Degenerate pivots then cannot cycle. The flow that is returned is computed from the last tree and the caller's
// masses.
#pragma once

#include <new>

#include "cpu/transport/lanes.h"

namespace fastkd::transport {
namespace {

constexpr int NONE = -1;
constexpr double WHOLE = 1152921504606846976.0;  // 2^60

struct Node {
  int64_t flow;  // on the arc to the parent; before a node has one, what is left of its mass
  int parent, child, next, previous, depth;
};

// Room for one problem at a time. Row i is node i, column j is node side + j; both sides are padded to whole vectors.
class Network {
 public:
  Network(int rows, int columns)
      : n(rows), m(columns), side(CpuLanes::stride(rows)), stride(CpuLanes::stride(columns)) {
    const size_t nodes = size_t(side) + size_t(stride), cells = size_t(n) * size_t(stride);
    workspace = static_cast<char*>(::operator new(
        cells * sizeof(double) + nodes * (2 * sizeof(double) + sizeof(Node) + sizeof(int)), std::align_val_t{64}));
    cost = reinterpret_cast<double*>(workspace);
    potential = cost + cells;
    mass = potential + nodes;
    node = reinterpret_cast<Node*>(mass + nodes);
    order = reinterpret_cast<int*>(node + nodes);
    for (size_t k = 0; k < cells; ++k) cost[k] = 0.0;
  }
  ~Network() { ::operator delete(workspace, std::align_val_t{64}); }
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  template <class Cost>
  void solve(const Batch& batch, int64_t p) {
    const int64_t cells = int64_t(n) * m;
    Workspace shape;  // for the functions that both solvers read a problem with
    shape.n = n, shape.m = m, shape.stride = stride, shape.cost = cost;
    CpuLanes lanes;
    const int exponent = load_cost(lanes, shape, static_cast<const Cost*>(batch.cost) + p * cells);
    Outcome outcome{BAD_COST, 0};
    if (exponent != NOT_FINITE)
      outcome.status =
          read_masses(static_cast<const Cost*>(batch.a) + p * n, static_cast<const Cost*>(batch.b) + p * m);
    if (outcome.status == OPTIMAL) {
      const double* const hint = batch.start_v ? batch.start_v + p * m : nullptr;
      start(hint, power_of_two(-exponent), !hint && nearly_monge(lanes, shape));
      outcome = improve();
    }
    write(outcome.status == OPTIMAL, batch.flow + p * cells, batch.u + p * n, batch.v + p * m, power_of_two(exponent));
    batch.status[p] = outcome.status;
    if (batch.pivots) batch.pivots[p] = outcome.pivots;
  }

 private:
  const int n, m, side, stride;
  char* workspace;
  double *cost, *potential, *mass;  // [n, stride], [side + stride], [side + stride]
  Node* node;
  int* order;  // parents before children
  int root = 0;

  double arc_cost(int x, int y) const {
    return x < side ? cost[int64_t(x) * stride + y - side] : cost[int64_t(y) * stride + x - side];
  }

  template <class Cost>
  int read_masses(const Cost* a, const Cost* b) {
    double total_a = 0, total_b = 0;
    bool valid = true;
    for (int i = 0; i < n; ++i) valid &= double(a[i]) >= 0.0, total_a += double(a[i]);
    for (int j = 0; j < m; ++j) valid &= double(b[j]) >= 0.0, total_b += double(b[j]);
    if (!valid || !(total_a + total_b < infinity())) return BAD_MASS;
    const double larger = total_a > total_b ? total_a : total_b, smaller = total_a > total_b ? total_b : total_a;
    if (larger - smaller > 1e-5 * larger) return UNEQUAL_MASS;
    const bool empty = !(smaller > 0.0);  // every tree is then feasible; these masses choose one
    int64_t difference = 0;
    int heaviest = side;
    for (int i = 0; i < n; ++i) {
      mass[i] = double(a[i]);
      node[i].flow = empty ? int64_t(m) : int64_t(mass[i] / total_a * WHOLE);
      difference += node[i].flow;
    }
    for (int j = 0; j < m; ++j) {
      const int x = side + j;
      mass[x] = empty ? 0.0 : double(b[j]) * (total_a / total_b);
      node[x].flow = empty ? int64_t(n) : int64_t(double(b[j]) / total_b * WHOLE) + 1;
      difference -= node[x].flow;
      if (node[x].flow > node[heaviest].flow) heaviest = x;
    }
    node[heaviest].flow += difference;
    return OPTIMAL;
  }

  // ---- the tree ----------------------------------------------------------------------------------------------------

  void link(int x, int up) {
    Node& below = node[x];
    below.parent = up, below.previous = NONE, below.next = node[up].child;
    if (below.next != NONE) node[below.next].previous = x;
    node[up].child = x;
  }

  void unlink(int x) {
    const Node& below = node[x];
    if (below.next != NONE) node[below.next].previous = below.previous;
    if (below.previous != NONE)
      node[below.previous].next = below.next;
    else
      node[below.parent].child = below.next;
  }

  // f(x) for every node below `top` and itself, parents before children.
  template <class F>
  void walk(int top, F f) {
    for (int x = top;;) {
      f(x);
      if (node[x].child != NONE) {
        x = node[x].child;
        continue;
      }
      while (x != top && node[x].next == NONE) x = node[x].parent;
      if (x == top) return;
      x = node[x].next;
    }
  }

  // Potentials, depths and the order from the tree; returns the size that rounding lets a reduced cost have by mistake.
  double solve_tree() {
    int count = 0;
    double largest = 0.0;
    walk(root, [&](int x) {
      const int up = node[x].parent;
      potential[x] = up == NONE ? 0.0 : arc_cost(x, up) - potential[up];
      node[x].depth = up == NONE ? 0 : node[up].depth + 1;
      order[count++] = x;
      const double size = potential[x] < 0.0 ? -potential[x] : potential[x];
      largest = size > largest ? size : largest;
    });
    return (32 + (n + m) / 8) * 2.220446049250313e-16 * largest;
  }

  // Row after row, into the column that is cheapest after the columns' least costs (or the hint) among those with mass
  // left. Whoever is used up hangs from the other; the last column takes all rows that are left, and is the root.
  void start(const double* hint, double scale, bool corner) {
    double* const v = potential + side;
    for (int x = 0; x < side + stride; ++x) node[x].parent = node[x].child = node[x].next = node[x].previous = NONE;
    for (int i = 0; i < side; ++i) potential[i] = 0.0;
    for (int j = 0; j < stride; ++j) {
      const double wanted = hint && j < m ? hint[j] * scale : 0.0;
      v[j] = j >= m ? -infinity() : !hint ? cost[j] : magnitude_bits(wanted) < WILD ? wanted : 0.0;
    }
    for (int i = 1; i < n && !hint && !corner; ++i) {
      const double* const row = cost + int64_t(i) * stride;
      for (int j = 0; j < m; ++j) v[j] = row[j] < v[j] ? row[j] : v[j];
    }
    int row = 0, column = 0, columns_left = m;
    for (int step = 0; step < n + m - 1; ++step) {
      if (!corner) column = cheapest(row, least(row));
      const int x = side + column;
      if (node[row].flow < node[x].flow || columns_left == 1) {
        node[x].flow -= node[row].flow;
        link(row++, x);
      } else {
        node[row].flow -= node[x].flow;
        link(x, row);
        v[column] = -infinity();
        --columns_left;
        if (corner) ++column;
      }
    }
    root = side + column;
  }

  // ---- the method --------------------------------------------------------------------------------------------------

  // The least cost[i][j] - v[j] of a row, and the first column that has it.
  double least(int i) const {
    const double *const row = cost + int64_t(i) * stride, *const v = potential + side;
    Vector one = Vector{} + infinity(), two = one, three = one, four = one;
    int j = 0;
    for (; j + 4 * WIDTH <= stride; j += 4 * WIDTH) {
      one = smaller(one, row + j, v + j), two = smaller(two, row + j + WIDTH, v + j + WIDTH);
      three = smaller(three, row + j + 2 * WIDTH, v + j + 2 * WIDTH);
      four = smaller(four, row + j + 3 * WIDTH, v + j + 3 * WIDTH);
    }
    for (; j < stride; j += WIDTH) one = smaller(one, row + j, v + j);
    one = two < one ? two : one, three = four < three ? four : three, one = three < one ? three : one;
    double best = one[0];
    for (int k = 1; k < WIDTH; ++k) best = one[k] < best ? one[k] : best;
    return best;
  }
  static Vector smaller(Vector least, const double* cost, const double* v) {
    const Vector x = *reinterpret_cast<const Vector*>(cost) - *reinterpret_cast<const Vector*>(v);
    return x < least ? x : least;
  }
  int cheapest(int i, double value) const {
    const double *const row = cost + int64_t(i) * stride, *const v = potential + side;
    int j = 0;
    while (j + 1 < m && row[j] - v[j] != value) ++j;
    return j;
  }

  // Row i and column j enter the basis with a negative reduced cost.
  void pivot(int i, int j, double reduced) {
    const int y = side + j;
    // The cycle runs from the apex down to i, over the new arc, and from j up again. Arcs against it lose flow: those
    // above rows on the first path, those above columns on the second.
    int64_t theta = INT64_MAX, theta_column = INT64_MAX;
    int out = NONE, out_column = NONE, a = i, b = y;
    while (a != b) {
      const bool first = node[a].depth >= node[b].depth, second = node[b].depth >= node[a].depth;
      if (first) {
        if (a < side && node[a].flow < theta) theta = node[a].flow, out = a;
        a = node[a].parent;
      }
      if (second) {
        if (b >= side && node[b].flow <= theta_column) theta_column = node[b].flow, out_column = b;
        b = node[b].parent;
      }
    }
    const int apex = a;
    const bool below_row = theta < theta_column;
    if (!below_row) theta = theta_column, out = out_column;
    for (int x = i; x != apex; x = node[x].parent) node[x].flow += x < side ? -theta : theta;
    for (int x = y; x != apex; x = node[x].parent) node[x].flow += x < side ? theta : -theta;
    // What is below the leaving arc hangs from the other end of the entering one.
    const int inner = below_row ? i : y;
    int64_t carried = theta;
    for (int x = inner, above = below_row ? y : i;;) {
      const int up = node[x].parent;
      const int64_t flow = node[x].flow;
      unlink(x);
      link(x, above);
      node[x].flow = carried;
      if (x == out) break;
      carried = flow, above = x, x = up;
    }
    const double by_row = below_row ? reduced : -reduced;
    walk(inner, [&](int x) {
      potential[x] += x < side ? by_row : -by_row;
      node[x].depth = node[node[x].parent].depth + 1;
    });
  }

  // Prices blocks of rows in turn; the most negative reduced cost of the first block that has one enters. Ends after a
  // whole round without one on potentials fresh from the tree: every answer has passed its own certificate.
  Outcome improve() {
    const int limit = 1000 * (n + m), block = rows_per_block();
    double tolerance = solve_tree();
    for (int row = 0, clean = 0, since = 0, pivots = 0;;) {
      const int end = row + block < n ? row + block : n;
      double best = infinity(), value = 0.0;
      int entering = row;
      for (int i = row; i < end; ++i) {
        const double x = least(i);
        if (x - potential[i] < best) best = x - potential[i], value = x, entering = i;
      }
      if (best < -tolerance) {
        if (pivots == limit) return Outcome{ITERATION_LIMIT, pivots};
        pivot(entering, cheapest(entering, value), best);
        ++pivots, ++since, clean = 0;
      } else {
        clean += end - row;
      }
      row = end < n ? end : 0;
      if (clean < n && since < n + m) continue;
      if (since == 0) return Outcome{OPTIMAL, pivots};
      tolerance = solve_tree();
      clean = since = 0;
    }
  }

  int rows_per_block() const {
    const int rows = 1 + 2048 / stride;
    return rows < n ? rows : n;
  }

  void write(bool solved, double* flow, double* u, double* v, double scale) {
    const double nan = from_bits(0x7ff8000000000000);
    for (int64_t k = 0; k < int64_t(n) * m; ++k) flow[k] = solved ? 0.0 : nan;
    for (int i = 0; i < n; ++i) u[i] = solved ? potential[i] * scale : nan;
    for (int j = 0; j < m; ++j) v[j] = solved ? potential[side + j] * scale : nan;
    for (int k = n + m - 1; solved && k > 0; --k) {  // what a subtree has too much goes up, what it lacks comes down
      const int x = order[k], up = node[x].parent;
      const double amount = mass[x] > 0.0 ? mass[x] : 0.0;
      mass[up] -= amount;
      flow[x < side ? int64_t(x) * m + up - side : int64_t(up) * m + x - side] = amount;
    }
  }
};

}  // namespace
}  // namespace fastkd::transport
