// The Lanes of transport_simplex.h on a CPU: vectors as wide as the instruction set this unit is compiled for.
#pragma once

#include "transport_simplex.h"

namespace fastkd {
namespace {
namespace transport {

#if defined(__AVX512F__)
constexpr int WIDTH = 8;
#elif defined(__AVX2__) || defined(__AVX__)
constexpr int WIDTH = 4;
#else
constexpr int WIDTH = 2;
#endif
typedef double Vector __attribute__((vector_size(8 * WIDTH)));
typedef int64_t Index __attribute__((vector_size(8 * WIDTH)));

struct CpuLanes {
#ifndef BROWS
#define BROWS 6
#endif
  static constexpr int ROWS = BROWS;  // rows in a pricing block
  static constexpr int ALIGN = 64;

  static int stride(int columns) { return (columns + WIDTH - 1) / WIDTH * WIDTH; }

  template <class F>
  void each(int n, F f) {
    for (int k = 0; k < n; ++k) f(k);
  }
  template <class F>
  void grid(int rows, int columns, F f) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) f(i, j);
  }
  template <class F>
  void single(F f) {
    f();
  }
  template <class F>
  int64_t largest(int n, F f) {
    int64_t top = 0;
    for (int k = 0; k < n; ++k) {
      const int64_t x = f(k);
      top = x > top ? x : top;
    }
    return top;
  }
  template <class F>
  double sum(int n, F f) {
    double total = 0.0;
    for (int k = 0; k < n; ++k) total += f(k);
    return total;
  }

  // The least cost[r][j] - u[r] - v[j].
  Best price(const double* cost, int rows, const double* u, const double* v, int stride) {
    Vector least = Vector{} + infinity();
    Index at = Index{}, lane;
    for (int k = 0; k < WIDTH; ++k) lane[k] = k;
    for (int r = 0; r < rows; ++r, cost += stride) {
      const Vector level = Vector{} + u[r];
      for (int j = 0; j < stride; j += WIDTH) {
        const Vector x = *reinterpret_cast<const Vector*>(cost + j) - *reinterpret_cast<const Vector*>(v + j) - level;
        const Index less = x < least;
        least = less ? x : least;
        at = less ? Index{} + int64_t(r * SIDE + j) : at;
      }
    }
    at += lane;
    double value = least[0];
    int64_t best = at[0];
    for (int k = 1; k < WIDTH; ++k) {
      const bool less = least[k] < value;
      value = less ? least[k] : value;
      best = less ? at[k] : best;
    }
    return Best{value, int(best / SIDE), int(best % SIDE)};
  }

  void shift(double* x, int n, uint64_t members, double by) {
    Index bit;
    for (int k = 0; k < WIDTH; ++k) bit[k] = 1ll << k;
    const Vector amount = Vector{} + by;
    for (int k = 0; k < n; k += WIDTH, members >>= WIDTH % 64) {
      const Index in = ((Index{} + int64_t(members)) & bit) != 0;
      Vector& part = *reinterpret_cast<Vector*>(x + k);
      part = in ? part + amount : part;
    }
  }
};

}  // namespace transport
}  // namespace
}  // namespace fastkd
