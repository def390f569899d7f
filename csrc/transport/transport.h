// A batch of transport problems as the solver sees it, on the host and on the device.
#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::transport {

constexpr int LARGEST_ON_HOST = 1 << 15;  // rows, columns; transport/start.h has the limit of the device

// What the weights of layers become after the transport between them, see csrc/transport/attention.h.
struct CostAttention {
  double *rows, *columns;  // [P, n], [P, m], or null: not wanted
  double temperature;
  bool inverse_cost, product_of_sums, joint, double_softmax;
};

struct Batch {
  const void *cost, *a, *b;  // [P, n, m], [P, n], [P, m], contiguous, all double or all float
  const double* start_flow;  // to start from: a flow of a similar problem [P, n, m], or null
  const double* start_v;     // and potentials of the columns [P, m], or null
  double *flow, *u, *v;      // [P, n, m], [P, n], [P, m]
  int32_t *status, *pivots;  // [P]; pivots may be null
  int n, m;
  CostAttention attention;
};

struct Table {  // solve the problems begin … end - 1; then, of all that there are, move the weights
  void (*doubles)(const Batch& batch, int64_t begin, int64_t end);
  void (*floats)(const Batch& batch, int64_t begin, int64_t end);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::transport
