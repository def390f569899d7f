#pragma once
#include <cstdint>

#include "cpu/simd/isa.h"

namespace fastkd::contrast {

constexpr int64_t kPanel = 32;       // queries that go through a block of the bank together: the row of a score tile
constexpr int64_t kColumnStep = 32;  // the width that weighted sums work in
constexpr int64_t kGathered =
    32;  // gathered rows, half of a first cache, whose scores are turned into weights together

// Beside the elements of cpu/runtime/tensors.h: float8 e4m3fn, only ever with a scale for each row of the bank.
constexpr int kFloat8 = 8;

// The running softmax of a panel of queries: sum = sum of e^(score - largest), in doubles.
struct PanelState {
  float largest[kPanel], shrink[kPanel];  // shrink: what the last block multiplied earlier sums by
  double sum[kPanel];
};

// One block of the bank against a panel. Scores are [keys][kPanel]: what belongs to a query stays in its lane.
struct Table {
  // Drops the scores whose key has the query's id.
  void (*exclude_ids)(float* scores, int64_t keys, int64_t queries, const int64_t* query_ids, const int64_t* bank_ids);
  // Scores become weights e^(score - largest): in place, or where `high` is not null as bfloat16 pairs of neighbouring
  // keys, [keys / 2][kPanel], rounded; `low`, if not null, takes what the rounding left over.
  void (*softmax_weights)(float* scores, int64_t keys, int64_t queries, PanelState* state, uint32_t* high,
                          uint32_t* low);
  // out [kPanel][width] = out * shrink + weights^T bank; width in steps of kColumnStep. `ahead`: fetch the next block.
  void (*weighted_sum)(const float* weights, const float* bank, int64_t row_stride, int64_t keys, int64_t queries,
                       int64_t width, const float* shrink, float* out, bool ahead);
  // The same on bfloat16 units; null where the instruction set cannot have them (and only for gemm().operand == 1).
  void (*weighted_sum_bfloat16)(const uint32_t* high, const uint32_t* low, const uint16_t* bank, int64_t row_stride,
                                int64_t keys, int64_t queries, int64_t width, const float* shrink, float* out,
                                bool ahead);
  // One query's dot products with all keys become e^(alpha x - largest), 0 where the key's id is `own` (without ids:
  // nowhere). Returns their sum, and `largest`.
  double (*exponentials)(float* x, int64_t keys, float alpha, const int64_t* ids, int64_t own, float* largest);
  void (*scale_row)(float* x, int64_t count, float factor);
  void (*add_scaled_row)(const float* x, float scale, int64_t count, float* sum);
  // `count` elements times `scale` as floats, zeros up to `padded`.
  void (*to_float32)(const void* x, int element, int64_t count, int64_t padded, float scale, float* out);
  // bank = normalised(momentum * bank + (1 - momentum) * row); left as it is if that is not finite. scratch: 2 rows.
  // Of a float8 bank row `scale` is the factor, which moves with it; of the others it is null.
  void (*update_row)(void* bank, int bank_element, float* scale, const void* row, int row_element, int64_t width,
                     double momentum, float* scratch);
};

// Rows of a bank chosen by an index, against one query.
struct Gathered {
  const char* bank;
  int element;
  int64_t row_bytes, width, padded;  // padded: width in steps of kColumnStep
  const int64_t* index;
  int64_t count;
  const float* scales;  // of the bank's rows, or null
  const int64_t* ids;   // likewise; rows with the id `own` are dropped (info_nce)
  int64_t own;
  float* scratch;  // [kGathered][padded], for rows that cannot be read where they lie
};

// score = <query, row> * scale - shift, both in two parts so that single precision does not round them.
struct ScoreOptions {
  float scale, scale_low, shift, shift_low;
};

struct GatherTable {
  bool (*indices_in_range)(const int64_t* index, int64_t count, int64_t rows);
  // query and sum are [padded] floats; sum, if not null, takes the weighted sum of the rows.
  // Returns sum of softplus(score), of the first row softplus(-score); weights are its derivatives.
  double (*nce)(const Gathered& rows, const float* query, ScoreOptions options, float* sum);
  // Weights are e^(score - largest); returns their sum.
  double (*softmax)(const Gathered& rows, const float* query, ScoreOptions options, float* largest, float* sum);
};

FASTKD_DECLARE_TABLE(Table, table);
FASTKD_DECLARE_TABLE(GatherTable, gather_table);

}  // namespace fastkd::contrast
