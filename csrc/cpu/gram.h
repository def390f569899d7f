#pragma once
#include <cstdint>

// A row of a side: `count` is a multiple of kGramLanes wherever it is not said otherwise; rows are filled up with
// zeros.
constexpr int64_t kGramLanes = 16;  // a multiple of every instruction set's vector

inline int64_t gram_padded(int64_t count) { return (count + kGramLanes - 1) / kGramLanes * kGramLanes; }

// What turns dL/du of a row into dL/dx, x the row as it was given.
struct GramRow {
  const void* row;      // u - centre in float32 or, `raw`, x in bfloat16
  const float* centre;  // null where raw
  bool raw, project;    // project: u = x / |x|; else u = scale * x with a constant scale
  float scale, sum;     // of the row of weights
};

struct GramTable {
  // `count` (any) elements copied, or widened into floats; returns the sum of their squares. `element`: cpu/tensors.h.
  // `next`: null, or the row that will be asked for next.
  double (*take)(const void* row, const void* next, int element, bool raw, int64_t count, void* out);
  void (*add_scaled)(const void* row, bool raw, float scale, int64_t count, float* sums);
  // row = (scale + scale_low) * row - centre, by one rounding where there are fused multiplications; returns
  // <row, centre>.
  double (*shift)(float* row, float scale, float scale_low, const float* centre, int64_t count);
  // tile = tile * scale_i * scale_j + offset_i + offset_j, then zeros from `columns` (any) to the next multiple.
  void (*place)(float* tile, int64_t stride, int64_t rows, int64_t columns, const float* scale_i, const float* scale_j,
                const float* offset_i, const float* offset_j);
  // Adds sum p p, sum q q and sum p q over a tile; columns from `once` on count twice.
  void (*moments)(const float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, int64_t once,
                  double* sums);
  // p = of_p * p + of_q * q
  void (*combine)(float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, float of_p, float of_q);
  // Rows [begin, end) of a symmetric matrix are written from `end` on to the columns that they are.
  void (*mirror)(float* matrix, int64_t stride, int64_t begin, int64_t end, int64_t size);
  // The sum of a row, whose elements are then multiplied by `scale` unless that is null.
  double (*weigh)(float* row, int64_t count, const float* scale);
  // `pull` holds the weighted sum of the other rows; `out` (which may be pull) becomes the gradient. `scratch`: count
  // floats.
  void (*finish)(const GramRow& of, int64_t count, float* pull, float* scratch, float* out);
  void (*narrow)(const float* in, int64_t count, uint16_t* out);  // any count, to bfloat16
  // The sum of by[k] times row k of `count` (any) elements, float32 or bfloat16 (`element`: cpu/tensors.h), to an
  // element type of its own; `sum` is scratch for gram_padded(count) floats.
  void (*blend)(const void* const* rows, int element, const float* by, int64_t terms, int64_t count, float* sum,
                int element_out, void* out);
};
