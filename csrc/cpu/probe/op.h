#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::probe {

struct Table {
  void (*row_sums)(const float* x, int64_t rows, int64_t columns, float* out);
};

FASTKD_DECLARE_TABLE(Table, table);

}  // namespace fastkd::probe
