#pragma once
#include <cstdint>

// What is done to a piece of a row of logits besides the divergence. A cap of 0 is none.
struct LinearTable {
  // x = cap tanh(scale (x + bias) / cap)
  void (*shape)(float* x, const float* bias, float scale, float cap, int64_t count);
  // grad *= d shape / dx, which follows from the shaped logits
  void (*unshape)(float* grad, const float* shaped, float scale, float cap, int64_t count);
  // grad += scale e^(x - log_sum)
  void (*add_softmax)(float* grad, const float* x, float log_sum, float scale, int64_t count);
  void (*add)(float* sum, const float* x, int64_t count);
  // out = in * factor, in the element of the second argument (tensors.h)
  void (*write)(const float* in, int element, float factor, void* out, int64_t count);
};
