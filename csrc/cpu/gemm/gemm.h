// One GEMM tile for every CPU stem:  C[m, n] (float32) = alpha * A[m, k] * B[n, k]^T,  or added to what C holds.
//
// Nothing here allocates or starts a thread: call it inside one thread on workspace of your own. Usage:
//
//     const Gemm& gemm = fastkd::gemm(element);                     // element of the operands; once per call of an op
//     gemm.pack_b({bank, element, D, 1, n, D}, workspace_b);        // B[n, D], row-major
//     gemm.pack_a({query, element, D, 1, m, D}, workspace_a);
//     gemm.tile(workspace_a, workspace_b, {m, n, D}, {scores, n, 1 / T, false});
//
// Products with A or B transposed are the same call with the strides of GemmSource exchanged: for P[m, j] * X[j, n]
// the second operand is {X, element, 1, row_stride_of_X, n, j}.
//
// Panels: rows are packed `rows_a` (`rows_b`) at a time, each panel over the whole of k. So the rows from r on, where r
// is a multiple of that height, begin at bytes_a(r, k): pack a range of rows per thread, or run a tile on some panels
// of a packed operand, by moving the pointer so far. Rows that are missing from the last panel are packed as zeros.
//
// C[i, j] depends on row i of A, row j of B, alpha and k only, bit for bit: not on m, n, where the tile begins, which
// thread runs it, or whether A was packed. With alpha = 1, A = B gives a symmetric C.
//
// bfloat16 operands need AVX-512-BF16 (vdpbf16ps): sums are float32, but it treats subnormal inputs and results as zero
// and rounds to nearest even whatever MXCSR says, and it adds the two products of a pair of k in an unfused way: the
// error is that of a float32 sum, not of an exact one. Where the machine lacks it, or multiplies float32 faster
// (Intel), gemm(kBFloat16).operand is float32: packing widens (exactly) and the float32 kernels run. Always ask
// `operand` before tile_direct.
#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd {

// What is packed: x[i, p] lies at data + (i * row_stride + p * k_stride) elements. `element` is fastkd::Element (0
// float32, 1 bfloat16, 2 float16), or kGemmLowPart: data is float32, and what is packed is x - bfloat16(x), so that two
// tiles (the value, then the low part added to it) multiply float32 numbers to 16 bits on bfloat16 units.
enum : int { kGemmLowPart = 3 };
struct GemmSource {
  const void* data;
  int element;
  int64_t row_stride, k_stride;
  int64_t rows, k;
};

struct GemmShape {
  int64_t m, n, k;
};

// With `accumulate` false C is only written (k = 0 writes zeros); with true it is read and added to.
struct GemmOut {
  float* data;
  int64_t row_stride;
  float alpha;
  bool accumulate;
};

struct Gemm {
  int operand;         // the packed element: 0 float32, 1 bfloat16
  int rows_a, rows_b;  // the height of a panel
  int64_t (*bytes_a)(int64_t rows, int64_t k);
  int64_t (*bytes_b)(int64_t rows, int64_t k);
  void (*pack_a)(const GemmSource& x, void* packed);
  void (*pack_b)(const GemmSource& x, void* packed);
  void (*tile)(const void* packed_a, const void* packed_b, const GemmShape& shape, const GemmOut& out);
  // A is read where it lies: row-major, k contiguous, its element equal to `operand`. Saves the packing where A is
  // large and B small (a bank, or a vocabulary, against a few queries).
  void (*tile_direct)(const void* a, int64_t row_stride, const void* packed_b, const GemmShape& shape,
                      const GemmOut& out);
};

struct GemmTable {
  Gemm float32;
  Gemm bfloat16;  // all null where this instruction set has no bfloat16 arithmetic
};

FASTKD_DECLARE_TABLE(GemmTable, gemm_table);

// For operands of this element (0, 1, 2); float16 is widened to float32. `float32_only` widens bfloat16 too.
const Gemm& gemm(int element, bool float32_only = false);

}  // namespace fastkd
