#include "cpu/simd/isa.h"
#include "cpu/transport/lanes.h"
#include "cpu/transport/network.h"
#include "transport/attention.h"
#include "transport/transport.h"

namespace fastkd::transport {

namespace {

template <class Cost>
void solve_small(const Batch& batch, int64_t begin, int64_t end) {
  alignas(64) double cost[SIDE * SIDE];
  alignas(64) Workspace workspace;
  workspace.cost = cost;
  CpuLanes lanes;
  for (int64_t p = begin; p < end; ++p) solve<Cost>(lanes, workspace, batch, p);
}

template <class Cost>
void solve_all(const Batch& batch, int64_t begin, int64_t end) {
  if (batch.n <= SIDE && batch.m <= SIDE) {
    solve_small<Cost>(batch, begin, end);
  } else {
    Network network(batch.n, batch.m);
    for (int64_t p = begin; p < end; ++p) network.solve<Cost>(batch, p);
  }
  CpuLanes lanes;
  if (batch.attention.rows) move_weights<Cost>(lanes, batch, end);
}

}  // namespace

const Table FASTKD_TABLE(table) = {solve_all<double>, solve_all<float>};

}  // namespace fastkd::transport
