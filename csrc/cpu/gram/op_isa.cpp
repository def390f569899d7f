// Rows and tiles of one group's Gram matrices; the mathematics is in gram/op.cpp.
#include "cpu/gram/op.h"

#include <algorithm>

#include "cpu/simd/isa.h"
#include "cpu/simd/vec.h"

namespace fastkd::gram {

namespace {

static_assert(kGramLanes % kLanes == 0, "padded rows must be whole vectors");

inline vfloat load_vector(const void* row, bool raw, int64_t k) {
  return raw ? load_bfloat16(static_cast<const uint16_t*>(row) + k) : load(static_cast<const float*>(row) + k);
}

// Vectors whose products are summed before they meet the others.
constexpr int64_t kRun = 8 * kLanes;

// The sum of term(k, lanes) for all vectors k of [0, count): in floats over a run, four sums side by side to hide their
// latency, and in doubles over the runs, so that a sum of squares is known to some 1e-8.
template <class Term>
inline double sum_in_runs(int64_t count, const Term& term) {
  vdouble sum = {};
  int64_t k = 0;
  for (; k + kRun <= count; k += kRun) {
    vfloat run[4];
    for (int i = 0; i < 4; ++i) run[i] = term(k + i * kLanes);
    for (int i = 0; i < 4; ++i) run[i] += term(k + (4 + i) * kLanes);
    sum += wide((run[0] + run[1]) + (run[2] + run[3]));
  }
  vfloat run = {};
  for (; k < count; k += kLanes) run += term(k);
  return sum_lanes(sum + wide(run));
}

template <bool raw>
double sum_of_squares(const void* row, int64_t count) {
  const int64_t whole = count / kLanes * kLanes, size = raw ? 2 : 4;
  char edge[kLanes * 4] = {};
  std::memcpy(edge, static_cast<const char*>(row) + whole * size, (count - whole) * size);
  return sum_in_runs(count > whole ? whole + kLanes : whole, [&](int64_t k) {
    const vfloat x = k == whole ? load_vector(edge, raw, 0) : load_vector(row, raw, k);
    return x * x;
  });
}

void copy_row(const void* row, int element, bool raw, int64_t count, void* out) {
  const int64_t size = raw ? 2 : 4;
  if (raw || as_floats(row, element, static_cast<float*>(out), count) == row) std::memcpy(out, row, count * size);
  std::memset(static_cast<char*>(out) + count * size, 0, (gram_padded(count) - count) * size);
}

double squared_norm(const void* row, int element, bool raw, int64_t count, void* out) {
  if (out) copy_row(row, element, raw, count, out);
  if (out) row = out;
  return raw ? sum_of_squares<true>(row, count) : sum_of_squares<false>(row, count);
}

void add_scaled_row(const void* row, bool raw, float scale, int64_t count, float* sums) {
  for (int64_t k = 0; k < count; k += kLanes) store(sums + k, load(sums + k) + load_vector(row, raw, k) * scale);
}

double centre_row(const float* row, float scale, const float* centre, bool square, int64_t count, float* out) {
  return sum_in_runs(count, [&](int64_t k) {
    const vfloat c = load(centre + k), v = load(row + k) * scale - c;
    store(out + k, v);
    return v * (square ? v : c);
  });
}

void scale_and_offset(float* tile, int64_t stride, int64_t rows, int64_t columns, const float* scale_i,
                      const float* scale_j, const float* offset_i, const float* offset_j) {
  const int64_t padded = gram_padded(columns);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * stride;
    for (int64_t j = 0; j < padded; j += kLanes)
      store(row + j, load(row + j) * scale_i[i] * load(scale_j + j) + (load(offset_j + j) + offset_i[i]));
    for (int64_t j = columns; j < padded; ++j) row[j] = 0;
  }
}

void add_moments(const float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, int64_t once,
                 double* sums) {
  vdouble pp = {}, qq = {}, pq = {};
  const auto add = [&](const float* a, const float* b, int64_t begin, int64_t end, double weight) {
    vfloat aa = {}, bb = {}, ab = {};
    for (int64_t j = begin; j < end; j += kLanes) {
      const vfloat x = load(a + j), y = load(b + j);
      aa += x * x;
      bb += y * y;
      ab += x * y;
    }
    pp += wide(aa) * weight;
    qq += wide(bb) * weight;
    pq += wide(ab) * weight;
  };
  for (int64_t i = 0; i < rows; ++i) {
    add(p + i * stride, q + i * stride, 0, once < columns ? once : columns, 1);
    if (once < columns) add(p + i * stride, q + i * stride, once, columns, 2);
  }
  sums[0] += sum_lanes(pp);
  sums[1] += sum_lanes(qq);
  sums[2] += sum_lanes(pq);
}

// In float64: the gradient is the component of q orthogonal to p, and may be much smaller than these sums.
Moments row_moments(const float* p, const float* q, int64_t columns) {
  const int64_t whole = columns / kLanes * kLanes;
  const auto each = [&](float fill_p, float fill_q, const auto& add) {
    for (int64_t j = 0; j < whole; j += kLanes) add(load(p + j), load(q + j));
    if (whole == columns) return;
    float edge_p[kLanes], edge_q[kLanes];
    std::fill_n(edge_p, kLanes, fill_p);
    std::fill_n(edge_q, kLanes, fill_q);
    std::copy(p + whole, p + columns, edge_p);
    std::copy(q + whole, q + columns, edge_q);
    add(load(edge_p), load(edge_q));
  };
  Moments moments_of_row = {double(columns), 0, 0, 0, 0, 0};
  if (columns == 0) return moments_of_row;
  vdouble sum_p = {}, sum_q = {}, pp = {}, qq = {}, pq = {};
  each(0, 0, [&](vfloat x, vfloat y) {
    sum_p += wide(x);
    sum_q += wide(y);
  });
  moments_of_row.mean_p = sum_lanes(sum_p) / double(columns);
  moments_of_row.mean_q = sum_lanes(sum_q) / double(columns);
  const auto mp = float(moments_of_row.mean_p), mq = float(moments_of_row.mean_q);
  each(mp, mq, [&](vfloat x, vfloat y) {
    const vdouble a = wide(x - mp), b = wide(y - mq);
    pp += a * a;
    qq += b * b;
    pq += a * b;
  });
  moments_of_row.pp = sum_lanes(pp);
  moments_of_row.qq = sum_lanes(qq);
  moments_of_row.pq = sum_lanes(pq);
  return moments_of_row;
}

void symmetric_weights(float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, const RowWeights& i,
                       const RowWeights& j) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = p + r * stride;
    const float* other = q + r * stride;
    for (int64_t k = 0; k < columns; k += kLanes) {
      const vfloat x = load(row + k), y = load(other + k);
      const vfloat x_i = x - i.mean_p[r], x_j = x - load(j.mean_p + k);
      const vfloat left_i = (y - i.mean_q[r] - x_i * i.high[r]) - (x_i * i.low[r] - i.rest[r]);
      const vfloat left_j =
          (y - load(j.mean_q + k) - x_j * load(j.high + k)) - (x_j * load(j.low + k) - load(j.rest + k));
      store(row + k, left_i * i.of_q[r] + left_j * load(j.of_q + k));
    }
    for (int64_t k = columns; k < gram_padded(columns); ++k) row[k] = 0;
  }
}

double sum_and_scale(float* row, int64_t count, const float* scale) {
  vdouble sum = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    const vfloat x = load(row + k);
    sum += wide(x);
    if (scale) store(row + k, x * load(scale + k));
  }
  return sum_lanes(sum);
}

void input_gradient(const RowGradient& of, int64_t count, float* product, float* scratch, const float* before,
                    float* out) {
  vfloat along_u = {};
  const auto* v = static_cast<const float*>(of.row);
  for (int64_t k = 0; k < count; k += kLanes) {
    vfloat u, d = load(product + k);
    if (of.raw) {
      u = load_vector(of.row, true, k) * of.scale;
    } else {
      const vfloat c = load(of.centre + k);
      u = load(v + k) + c;
      d += (of.project ? -load(v + k) : c) * of.sum;
    }
    store(scratch + k, u);
    store(product + k, d);
    along_u += u * d;
  }
  const float along = of.project ? sum_lanes(along_u) : 0.f;
  for (int64_t k = 0; k < count; k += kLanes) {
    const vfloat d = load(product + k), x = (of.project ? d - load(scratch + k) * along : d) * of.scale;
    store(out + k, before ? load(before + k) + x : x);
  }
}

void add_to_float64(const float* from, int64_t count, double* into) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) into[k] += from[k];
}

void to_float32(const void* in, int element, int64_t count, float* out) {
  if (as_floats(in, element, out, count) == in) std::memcpy(out, in, count * sizeof(float));
}

void from_float32(const float* in, int element, int64_t count, void* out) {
  if (element == 0)
    std::memcpy(out, in, count * sizeof(float));
  else
    (element == 1 ? narrow_bfloat16 : narrow_float16)(in, static_cast<uint16_t*>(out), count);
}

void weighted_sum(const void* const* rows, int element, const float* by, int64_t terms, int64_t count, float* sum,
                  int element_out, void* out) {
  const int64_t whole = count / kLanes * kLanes, size = element == 1 ? 2 : 4;
  for (int64_t k = 0; k < count; k += kLanes) {
    vfloat total = {};
    for (int64_t term = 0; term < terms; ++term) {
      char edge[kLanes * 4] = {};
      const char* from = static_cast<const char*>(rows[term]) + k * size;
      if (k == whole) from = static_cast<char*>(std::memcpy(edge, from, (count - k) * size));
      total += load_vector(from, element == 1, 0) * by[term];
    }
    store(sum + k, total);
  }
  from_float32(sum, element_out, count, out);
}

}  // namespace

const Table FASTKD_TABLE(table) = {copy_row,       squared_norm, add_scaled_row,    centre_row,    scale_and_offset,
                                   add_moments,    row_moments,  symmetric_weights, sum_and_scale, input_gradient,
                                   add_to_float64, to_float32,   from_float32,      weighted_sum};

}  // namespace fastkd::gram
