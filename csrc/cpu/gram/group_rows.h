// One side (student or teacher) of one group: its rows, centred where that is possible, packed, and strips of its Gram.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/gram/op.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/tensors.h"

namespace fastkd::gram {

constexpr int64_t kSkew = 16;  // floats added to a row's stride: powers of two would fall on the same cache sets
constexpr double kLeastNorm = 1e-12;

constexpr int64_t kAhead = 3;  // rows that are fetched before it is their turn

inline void fetch(const char* row, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k);
}

// Work on ranges [begin, end) of `count`, one after another or over the threads.
template <class F>
void each(bool threads, int64_t count, int64_t step, const F& f) {
  const int64_t chunks = (count + step - 1) / step;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * step, (i + 1) * step < count ? (i + 1) * step : count);
  };
  if (threads)
    parallel_for(0, chunks, 1, run);
  else
    run(0, chunks);
}

// 1 / |x| of every row [B, N] of a tensor, found by the first level that needs them.
struct Norms {
  std::vector<float> inverse;
  bool known = false;
};

struct GroupRows {
  const Table& table;
  const Gemm& gemm;
  const char* data;
  int element;
  int64_t item, group_stride, row_stride;  // in bytes
  int64_t norm_group, norm_row;
  int64_t most_rows, width, padded, stride;
  bool raw;     // bfloat16 rows are multiplied as they are, exactly; all others are centred floats
  bool copied;  // rows cannot be read where they lie: not floats, or not whole vectors
  bool normalize;
  bool per_row;          // a correlation is of single rows of the Gram
  int64_t strip, chunk;  // rows of a strip of the Gram, and rows that are prepared together: whole panels
  Norms* norms;

  // Of the group at hand.
  char *rows, *packed, *transposed;
  float *scale, *offset, *centre, *sums, *squares;
  std::vector<int64_t>
      zeros;       // rows of zeros, which have no part in c, and whose v is 0 too; found for rows' correlations
  bool all_equal;  // all rows are the same: the centred Gram is 0, without rounding that eps would make large
  // The mean of the Gram, which is taken off its entries: |c|^2; and the same less what is 1 for all groups.
  double square, level;

  // `as_floats`: bfloat16 rows too.
  GroupRows(const Table& table, const Tensor& x, bool sequence, bool normalize, bool per_row, bool as_floats,
            Norms* norms)
      : table(table),
        gemm(fastkd::gemm(element_of(x), as_floats)),
        data(static_cast<const char*>(x.const_data_ptr())),
        element(element_of(x)),
        item(int64_t(x.element_size())),
        group_stride(x.stride(sequence ? 1 : 0) * item),
        row_stride(x.stride(sequence ? 0 : 1) * item),
        norm_group(sequence ? 1 : x.size(1)),
        norm_row(sequence ? x.size(1) : 1),
        most_rows(x.size(sequence ? 0 : 1)),
        width(x.size(2)),
        padded(gram_padded(width)),
        stride(padded + kSkew),
        raw(element == kBFloat16 && gemm.operand == kBFloat16),
        copied(raw || element != kFloat32 || padded != width),
        normalize(normalize),
        per_row(per_row),
        norms(norms) {
    norms->inverse.resize(normalize ? x.size(0) * x.size(1) : 1);
    set_strip((32 + gemm.rows_b - 1) / gemm.rows_b * gemm.rows_b);
  }

  void set_strip(int64_t rows_of_a_strip) {
    strip = rows_of_a_strip;
    chunk = 2 * strip;
  }
  // Both sides' Grams are cut alike.
  static void align_strips(GroupRows& s, GroupRows& t) {
    int64_t rows = s.strip;
    while (rows % t.strip) rows += s.strip;
    s.set_strip(rows);
    t.set_strip(rows);
  }

  int64_t row_bytes() const { return stride * (raw ? 2 : 4); }
  char* row(int64_t i) const { return rows + i * row_bytes(); }
  bool is_zero(int64_t i) const { return !zeros.empty() && std::binary_search(zeros.begin(), zeros.end(), i); }
  bool unit_length(int64_t i) const { return normalize && scale[i] < float(1 / kLeastNorm); }  // u is of length 1

  // The statistics of a pass over the rows of a group.
  void lay_out_means(Arena& arena) {
    rows = nullptr;
    scale = arena.piece<float>(gram_padded(most_rows));
    centre = arena.piece<float>(padded);
    sums = arena.piece<float>((most_rows + chunk - 1) / chunk * padded);
  }
  // `block`: rows in one piece of the transposed operand, 0 where no gradient is requested.
  void lay_out(Arena& arena, int64_t block) {
    const int64_t n = gram_padded(most_rows);
    lay_out_means(arena);
    rows = arena.piece<char>(most_rows * row_bytes());
    packed = arena.piece<char>(gemm.bytes_b(n + chunk, width));
    transposed = arena.piece<char>(block ? (most_rows + block - 1) / block * gemm.bytes_b(width, block) : 0);
    offset = arena.piece<float>(n);
    squares = arena.piece<float>(n);
  }

  // The valid rows of the group: scaled, and their mean subtracted.
  void prepare(int64_t group, const std::vector<int64_t>& valid, bool threads) {
    const int64_t n = int64_t(valid.size());
    scale_and_sum(group, valid, threads);
    mean(group, valid);
    level = !normalize ? square : all_equal && unit_length(0) ? 0 : square - 1;
    if (raw) {
      for (int64_t i = 0; i < n; ++i) offset[i] = float(-square / 2);
    } else {
      shift(group, valid, threads);
    }
    for (int64_t i = n; i < gram_padded(n); ++i) scale[i] = offset[i] = 0;
  }

  const char* source_row(int64_t group, int64_t row) const { return data + group * group_stride + row * row_stride; }
  // Rows of a chunk, as soon as they are what they will be and still in the cache.
  void pack(int64_t begin, int64_t end) const {
    gemm.pack_b({row(begin), raw ? kBFloat16 : kFloat32, stride, 1, end - begin, width},
                packed + gemm.bytes_b(begin, width));
  }

  // Lengths, and the sum of the rows of each chunk; rows that cannot be read where they lie are copied to `rows`.
  void scale_and_sum(int64_t group, const std::vector<int64_t>& valid, bool threads) {
    each(threads, int64_t(valid.size()), chunk, [&](int64_t begin, int64_t end) {
      float* sum = sums + begin / chunk * padded;
      std::memset(sum, 0, padded * sizeof(float));
      std::vector<float> passing(copied && !rows ? padded : 0);
      for (int64_t i = begin; i < end; ++i) {
        const char* x = source_row(group, valid[i]);
        if (i + kAhead < end) fetch(source_row(group, valid[i + kAhead]), width * item);
        char* copy = !copied ? nullptr : rows ? row(i) : reinterpret_cast<char*>(passing.data());
        float& inverse = norms->inverse[normalize ? group * norm_group + valid[i] * norm_row : 0];
        if (normalize && !norms->known) {
          const double squares = table.squared_norm(x, element, raw, width, copy);
          inverse = float(1 / (squares < kLeastNorm * kLeastNorm ? kLeastNorm : std::sqrt(squares)));
        } else if (copied) {
          table.copy_row(x, element, raw, width, copy);
        }
        scale[i] = normalize ? inverse : 1;
        if (per_row && !unit_length(i))
          squares[i] = float(table.squared_norm(copied ? copy : x, raw ? kBFloat16 : kFloat32, raw, width, nullptr));
        table.add_scaled_row(copied ? copy : x, raw, scale[i], padded, sum);
      }
      if (raw) pack(begin, end);
    });
  }

  void mean(int64_t group, const std::vector<int64_t>& valid) {
    const auto n = int64_t(valid.size());
    zeros.clear();
    for (int64_t i = 0; per_row && i < n; ++i)
      if (!unit_length(i) && squares[i] == 0) zeros.push_back(i);
    const auto others = double(std::max<int64_t>(n - int64_t(zeros.size()), 1));
    const char* first = source_row(group, valid[0]);
    all_equal = true;
    for (int64_t i = 1; all_equal && i < n; ++i)
      all_equal = !std::memcmp(source_row(group, valid[i]), first, width * item);
    square = 0;
    for (int64_t k = 0; k < padded; ++k) {
      double sum = 0;
      for (int64_t c = 0; c * chunk < n; ++c) sum += sums[c * padded + k];
      centre[k] = float(sum / others);
      square += sum / others * (sum / others);
    }
    all_equal = all_equal && std::isfinite(square);
    if (all_equal) {
      table.copy_row(first, element, false, width, centre);
      square = 0;
      for (int64_t k = 0; k < width; ++k) {
        centre[k] *= scale[0];
        square += double(centre[k]) * centre[k];
      }
    }
    if (per_row && centring_adds_rounding(n, others)) {
      std::memset(centre, 0, padded * sizeof(float));
      square = 0;
    }
  }

  // Whether centring does not reduce the rounding error of the Gram's rows: for rows of length |u| it is about |c| /
  // |u| with c subtracted and |c| / |v| without; the factor 2 is for the rounding of <c, v>, which is added back.
  bool centring_adds_rounding(int64_t n, double others) const {
    double all = 0, inverse = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double own = unit_length(i) ? 1 : squares[i];
      all += own;
      if (own > 0) inverse += 1. / own;
    }
    return 2 * inverse * (all - others * square) > others * others;
  }

  // v = u - c to `to`; returns <c, v>. Where |u| is 1 that is (1 - |c|^2 - |v|^2) / 2, up to a constant: the better way
  // where c is the larger part, since no error of |u| counts then. `copied_already`: `to` holds the row.
  double shift_row(const char* x, int64_t i, bool copied_already, float* to) const {
    if (copied && !copied_already) table.copy_row(x, element, false, width, to);
    const auto* from = copied ? to : reinterpret_cast<const float*>(x);
    if (all_equal || is_zero(i)) {
      std::memset(to, 0, padded * sizeof(float));
      return 0;
    }
    if (!by_length()) return table.centre_row(from, scale[i], centre, false, padded, to);
    const double lost =
        unit_length(i) ? 0
                       : 1 - double(scale[i]) * scale[i] * table.squared_norm(from, kFloat32, false, padded, nullptr);
    return (1 - square - lost - table.centre_row(from, scale[i], centre, true, padded, to)) / 2;
  }
  bool by_length() const { return normalize && square > 0.5; }

  void shift(int64_t group, const std::vector<int64_t>& valid, bool threads) {
    const int64_t n = int64_t(valid.size());
    const auto others = double(std::max<int64_t>(n - int64_t(zeros.size()), 1));
    std::vector<double> onto(n);
    each(threads, n, chunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        onto[i] = shift_row(source_row(group, valid[i]), i, true, reinterpret_cast<float*>(row(i)));
      pack(begin, end);
    });
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += onto[i];
    for (int64_t i = 0; i < n; ++i) offset[i] = float(onto[i] - sum / others);
    if (by_length() && !all_equal)
      level = 2 * sum / others - (1 - square);  // |c|^2 - 1 = -mean |v|^2, with all its digits
  }

  // Rows [i, i_end) and columns [j, j_end) of the centred Gram, zeros up to the next multiple of kGramLanes.
  void tile(int64_t i, int64_t i_end, int64_t j, int64_t j_end, const float* ones, float* out,
            int64_t out_stride) const {
    if (all_equal) {
      for (; i < i_end; ++i, out += out_stride) std::memset(out, 0, gram_padded(j_end - j) * sizeof(float));
      return;
    }
    gemm.tile_direct(row(i), stride, packed + gemm.bytes_b(j, width), {i_end - i, j_end - j, width},
                     {out, out_stride, 1, false});
    const float* by = raw ? scale : nullptr;
    table.scale_and_offset(out, out_stride, i_end - i, j_end - j, by ? by + i : ones, by ? by + j : ones, offset + i,
                           offset + j);
    const auto of_zeros = float(normalize ? -1 - level : -level);
    for (int64_t k : zeros) {
      if (i <= k && k < i_end) std::fill_n(out + (k - i) * out_stride, j_end - j, of_zeros);
      for (int64_t r = 0; j <= k && k < j_end && r < i_end - i; ++r) out[r * out_stride + k - j] = of_zeros;
    }
  }

  // The rows as the second operand of (weights x rows), in pieces of `block` rows.
  void pack_transposed(int64_t n, int64_t block, bool threads) {
    each(threads, n, block, [&](int64_t begin, int64_t end) {
      gemm.pack_b({row(begin), raw ? kBFloat16 : kFloat32, 1, stride, width, end - begin}, piece(begin, block));
    });
  }
  char* piece(int64_t begin, int64_t block) const { return transposed + begin / block * gemm.bytes_b(width, block); }
};

}  // namespace fastkd::gram
