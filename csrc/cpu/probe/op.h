#pragma once
#include <cstdint>

struct ProbeTable {
  void (*row_sums)(const float* x, int64_t rows, int64_t columns, float* out);
};
