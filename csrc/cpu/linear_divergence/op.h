#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::linear_divergence {

// What is done to a piece of a row of logits besides the divergence. A cap of 0 is none.
struct Table {
  // x = cap tanh(scale (x + bias) / cap)
  void (*scale_and_cap)(float* x, const float* bias, float scale, float cap, int64_t count);
  // grad *= d shape / dx, which follows from the shaped logits
  void (*scale_and_cap_gradient)(float* grad, const float* changes_logits, float scale, float cap, int64_t count);
  // grad += scale e^(x - log_sum)
  void (*add_softmax)(float* grad, const float* x, float log_sum, float scale, int64_t count);
  void (*add_row)(float* sum, const float* x, int64_t count);
  // out = in * factor, each of its element (runtime/tensors.h); they may be the same memory if the elements are the
  // same
  void (*scale_row)(const void* in, int in_element, float factor, void* out, int element, int64_t count);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::linear_divergence
