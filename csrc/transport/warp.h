// The Lanes of transport/simplex.h that are 32 wide: a warp of a GPU, or 32 lanes played one after the other on the
// host. They differ in the two functions of the machine, `run` and `agree`; everything else is the same code.
#pragma once

#include "transport/simplex.h"

#ifndef __CUDACC__
#include <cstdlib>
#endif

namespace fastkd::transport {
namespace {

#ifdef __CUDACC__

struct Machine {
  static __device__ __forceinline__ int64_t across(int64_t x, int by) {
    return __shfl_xor_sync(0xffffffffu, static_cast<long long>(x), by);
  }
  static __device__ __forceinline__ double across(double x, int by) { return __shfl_xor_sync(0xffffffffu, x, by); }
  static __device__ __forceinline__ Best across(Best x, int by) {
    return Best{across(x.value, by), __shfl_xor_sync(0xffffffffu, x.row, by),
                __shfl_xor_sync(0xffffffffu, x.column, by)};
  }
  // f(lane) on every lane. What was written before is seen by all, and so is what f writes.
  template <class F>
  __device__ __forceinline__ void run(F f) {
    __syncwarp();
    f(int(threadIdx.x & 31));
    __syncwarp();
  }
  // One value from 32, by a butterfly of `merge`.
  template <class F, class Merge>
  __device__ __forceinline__ auto agree(F f, Merge merge) {
    auto x = f(int(threadIdx.x & 31));
    for (int by = 16; by > 0; by /= 2) x = merge(x, across(x, by));
    return x;
  }
};

#else

struct Machine {
  // The last lane first in every second call: an order that a kernel relies on by mistake shows.
  template <class F>
  void run(F f) {
    turn = !turn;
    for (int k = 0; k < 32; ++k) f(turn ? 31 - k : k);
  }
  template <class F, class Merge>
  auto agree(F f, Merge merge) {
    decltype(f(0)) x[32], y[32];
    for (int lane = 0; lane < 32; ++lane) x[lane] = f(lane);
    for (int by = 16; by > 0; by /= 2) {
      for (int lane = 0; lane < 32; ++lane) y[lane] = merge(x[lane], x[lane ^ by]);
      for (int lane = 0; lane < 32; ++lane) x[lane] = y[lane];
    }
    for (int lane = 1; lane < 32; ++lane)  // a warp branches on this value: lanes that disagree would part for ever
      if (std::memcmp(x, x + lane, sizeof *x) != 0) std::abort();
    return x[0];
  }
  bool turn = false;
};

#endif

struct WarpLanes {
  static constexpr int ROWS = 8;  // rows in a pricing block
  Machine machine;
  int columns, rows_ahead, columns_ahead;  // 32 entries further on in a matrix

  FASTKD_LANES int stride(int m) {
    columns = m, rows_ahead = 32 / m, columns_ahead = 32 % m;
    return m;
  }
  template <class F>
  FASTKD_LANES void each(int n, F f) {
    machine.run([&](int lane) {
      for (int k = lane; k < n; k += 32) f(k);
    });
  }
  template <class F>
  FASTKD_LANES void grid(int rows, int, F f) {
    machine.run([&](int lane) { walk(lane, rows, f); });
  }
  template <class F>
  FASTKD_LANES void single(F f) {
    machine.run([&](int lane) {
      if (lane == 0) f();
    });
  }
  template <class F>
  FASTKD_LANES int64_t largest(int n, F f) {
    const auto top_of = [&](int lane) {
      int64_t top = 0;
      for (int k = lane; k < n; k += 32) {
        const int64_t x = f(k);
        top = x > top ? x : top;
      }
      return top;
    };
    return machine.agree(top_of, [](int64_t x, int64_t y) { return x > y ? x : y; });
  }
  template <class F>
  FASTKD_LANES double sum(int n, F f) {
    const auto sum_of = [&](int lane) {
      double total = 0.0;
      for (int k = lane; k < n; k += 32) total += f(k);
      return total;
    };
    return machine.agree(sum_of, [](double x, double y) { return x + y; });
  }
  // The least cost[r][j] - u[r] - v[j]; of equals, the first.
  FASTKD_LANES Best price(const double* cost, int rows, const double* u, const double* v, int stride) {
    const auto best_of = [&](int lane) {
      Best best{infinity(), rows, 0};
      walk(lane, rows, [&](int r, int j) {
        const double x = cost[r * stride + j] - v[j] - u[r];
        if (x < best.value) best = Best{x, r, j};
      });
      return best;
    };
    return machine.agree(best_of, [](const Best& x, const Best& y) {
      const bool first = x.row < y.row || (x.row == y.row && x.column < y.column);
      return x.value < y.value || (x.value == y.value && first) ? x : y;
    });
  }
  FASTKD_LANES void shift(double* x, int n, uint64_t members, double by) {
    each(n, [=](int k) {
      if (members >> k & 1) x[k] += by;
    });
  }

 private:
  template <class F>
  FASTKD_LANES void walk(int lane, int rows, F f) {
    int r = lane / columns, j = lane % columns;
    while (r < rows) {
      f(r, j);
      r += rows_ahead, j += columns_ahead;
      if (j >= columns) j -= columns, ++r;
    }
  }
};

}  // namespace
}  // namespace fastkd::transport
