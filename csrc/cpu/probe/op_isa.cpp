#include "cpu/probe/op.h"
#include "cpu/simd/isa.h"

namespace fastkd::probe {

namespace {

void row_sums(const float* x, int64_t rows, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) sum += x[i * columns + j];
    out[i] = sum;
  }
}

}  // namespace

const Table FASTKD_TABLE(table) = {row_sums};

}  // namespace fastkd::probe
