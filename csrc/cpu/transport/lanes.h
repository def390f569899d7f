// The Lanes of transport/simplex.h on a CPU: vectors as wide as the instruction set this unit is compiled for.
#pragma once

#include "transport/simplex.h"

namespace fastkd::transport {
namespace {

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
  static constexpr int ROWS = 6;  // rows in a pricing block

  static int stride(int columns) { return (columns + WIDTH - 1) / WIDTH * WIDTH; }

  template <class F>
  void each(int n, F f) {
#pragma omp simd
    for (int k = 0; k < n; ++k) f(k);
  }
  template <class F>
  void grid(int rows, int columns, F f) {
    for (int i = 0; i < rows; ++i)
#pragma omp simd
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
#pragma omp simd reduction(+ : total)
    for (int k = 0; k < n; ++k) total += f(k);
    return total;
  }

  // The least cost[r][j] - u[r] - v[j]. Two rows at a time: their comparisons do not wait for each other.
  Best price(const double* cost, int rows, const double* u, const double* v, int stride) {
    Vector least = Vector{} + infinity(), least_odd = least;
    Index at = Index{}, at_odd = at;
    int r = 0;
    for (; r + 1 < rows; r += 2, cost += 2 * stride) {
      const Vector level = Vector{} + u[r], level_odd = Vector{} + u[r + 1];
      for (int j = 0; j < stride; j += WIDTH) {
        const Vector columns = load(v + j);
        keep(least, at, load(cost + j) - columns - level, r * SIDE + j);
        keep(least_odd, at_odd, load(cost + stride + j) - columns - level_odd, (r + 1) * SIDE + j);
      }
    }
    if (r < rows) {
      const Vector level = Vector{} + u[r];
      for (int j = 0; j < stride; j += WIDTH) keep(least, at, load(cost + j) - load(v + j) - level, r * SIDE + j);
    }
    Index lane;
    for (int k = 0; k < WIDTH; ++k) lane[k] = k;
    at += lane, at_odd += lane;
    keep(least, at, least_odd, at_odd);
    for (int half = WIDTH / 2; half > 0; half /= 2) keep(least, at, swapped(least, half), swapped(at, half));
    return Best{least[0], int(at[0] / SIDE), int(at[0] % SIDE)};
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

 private:
  static Vector load(const double* x) { return *reinterpret_cast<const Vector*>(x); }
  static void keep(Vector& least, Index& at, Vector x, Index x_at) {
    const Index less = x < least;
    least = less ? x : least;
    at = less ? x_at : at;
  }
  static void keep(Vector& least, Index& at, Vector x, int x_at) { keep(least, at, x, Index{} + int64_t(x_at)); }
  template <class V>
  static V swapped(V x, int half) {  // neighbouring blocks of `half` lanes change places
#ifdef __clang__
    V y;
    for (int k = 0; k < WIDTH; ++k) y[k] = x[k ^ half];
    return y;
#else
    Index from;
    for (int k = 0; k < WIDTH; ++k) from[k] = k ^ half;
    return __builtin_shuffle(x, from);
#endif
  }
};

}  // namespace
}  // namespace fastkd::transport
