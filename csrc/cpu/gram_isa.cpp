// Rows and tiles of one group's Gram matrices; the mathematics is in gram.cpp.
#include "cpu/gram.h"

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace {

static_assert(kGramLanes % kLanes == 0, "padded rows must be whole vectors");

typedef double vdouble __attribute__((vector_size(kLanes * 8)));

inline vdouble wide(vfloat x) { return __builtin_convertvector(x, vdouble); }
inline double sum_lanes(vdouble x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

inline vfloat load_bfloat16(const uint16_t* p) {
  vhalf x;
  std::memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)  // one instruction, of which __builtin_convertvector makes four
  return from_bits((vint)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#elif defined(__AVX2__)
  return from_bits((vint)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return from_bits(__builtin_convertvector(x, vint) << 16);
#endif
}

inline vfloat load_row(const void* row, bool raw, int64_t k) {
  return raw ? load_bfloat16(static_cast<const uint16_t*>(row) + k) : load(static_cast<const float*>(row) + k);
}

// Vectors whose products are summed before they meet the others.
constexpr int64_t kRun = 8 * kLanes;

template <class Source>
double copy_and_square(const Source* row, const Source* next, int64_t count, Source* out) {
  constexpr bool kRaw = sizeof(Source) == 2;
  vdouble sum = {};  // in doubles at once: an error of a length shifts a whole row of the Gram
  std::memset(static_cast<void*>(out + count), 0, (gram_padded(count) - count) * sizeof(Source));
  int64_t k = 0;
  while (k + kLanes <= count) {
    const int64_t end = k + kRun < count ? k + kRun : count;
    vdouble run = {};
    for (; k + kLanes <= end; k += kLanes) {
      if (next) __builtin_prefetch(next + k);
      const vdouble x = wide(load_row(row + k, kRaw, 0));
      if (out != row) std::memcpy(out + k, row + k, kLanes * sizeof(Source));
      run += x * x;
    }
    sum += run;
  }
  if (k < count) {
    if (out != row) std::memcpy(out + k, row + k, (count - k) * sizeof(Source));
    const vdouble x = wide(load_row(out + k, kRaw, 0));
    sum += x * x;
  }
  return sum_lanes(sum);
}

double take(const void* row, const void* next, int element, bool raw, int64_t count, void* out) {
  if (raw)
    return copy_and_square(static_cast<const uint16_t*>(row), static_cast<const uint16_t*>(next), count,
                           static_cast<uint16_t*>(out));
  auto* floats = static_cast<float*>(out);
  if (element == 0)
    return copy_and_square(static_cast<const float*>(row), static_cast<const float*>(next), count, floats);
  as_floats(row, element, floats, count);
  return copy_and_square<float>(floats, nullptr, count, floats);
}

void add_scaled(const void* row, bool raw, float scale, int64_t count, float* sums) {
  for (int64_t k = 0; k < count; k += kLanes) store(sums + k, load(sums + k) + load_row(row, raw, k) * scale);
}

double shift(float* row, float scale, float scale_low, const float* centre, int64_t count) {
  vdouble sum = {};
  for (int64_t k = 0; k < count;) {
    const int64_t end = k + kRun < count ? k + kRun : count;
    vfloat run = {};
    for (; k < end; k += kLanes) {
      const vfloat x = load(row + k), c = load(centre + k);
      const vfloat v = x * scale_low + (x * scale - c);
      store(row + k, v);
      run += v * c;
    }
    sum += wide(run);
  }
  return sum_lanes(sum);
}

void place(float* tile, int64_t stride, int64_t rows, int64_t columns, const float* scale_i, const float* scale_j,
           const float* offset_i, const float* offset_j) {
  const int64_t padded = gram_padded(columns);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * stride;
    for (int64_t j = 0; j < padded; j += kLanes)
      store(row + j, load(row + j) * scale_i[i] * load(scale_j + j) + (load(offset_j + j) + offset_i[i]));
    for (int64_t j = columns; j < padded; ++j) row[j] = 0;
  }
}

void moments(const float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, int64_t once,
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

void combine(float* p, const float* q, int64_t stride, int64_t rows, int64_t columns, float of_p, float of_q) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      float* x = p + i * stride + j;
      store(x, load(x) * of_p + load(q + i * stride + j) * of_q);
    }
}

void mirror(float* matrix, int64_t stride, int64_t begin, int64_t end, int64_t size) {
  constexpr int64_t kBlock = 16;
  for (int64_t j = end; j < size; j += kBlock)
    for (int64_t i = begin; i < end; i += kBlock)
      for (int64_t b = j; b < j + kBlock && b < size; ++b)
        for (int64_t a = i; a < i + kBlock && a < end; ++a) matrix[b * stride + a] = matrix[a * stride + b];
}

double weigh(float* row, int64_t count, const float* scale) {
  vdouble sum = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    const vfloat x = load(row + k);
    sum += wide(x);
    if (scale) store(row + k, x * load(scale + k));
  }
  return sum_lanes(sum);
}

void finish(const GramRow& of, int64_t count, float* pull, float* scratch, float* out) {
  vfloat along_u = {};
  const auto* v = static_cast<const float*>(of.row);
  for (int64_t k = 0; k < count; k += kLanes) {
    vfloat u, d = load(pull + k);
    if (of.raw) {
      u = load_row(of.row, true, k) * of.scale;
    } else {
      const vfloat c = load(of.centre + k);
      u = load(v + k) + c;
      d += (of.project ? -load(v + k) : c) * of.sum;
    }
    store(scratch + k, u);
    store(pull + k, d);
    along_u += u * d;
  }
  const float along = of.project ? sum_lanes(along_u) : 0.f;
  for (int64_t k = 0; k < count; k += kLanes) {
    const vfloat d = load(pull + k);
    store(out + k, (of.project ? d - load(scratch + k) * along : d) * of.scale);
  }
}

void narrow(const float* in, int64_t count, uint16_t* out) { narrow_bfloat16(in, out, count); }

void blend(const void* const* rows, int element, const float* by, int64_t terms, int64_t count, float* sum,
           int element_out, void* out) {
  const int64_t whole = count / kLanes * kLanes, size = element == 1 ? 2 : 4;
  for (int64_t k = 0; k < count; k += kLanes) {
    vfloat total = {};
    for (int64_t term = 0; term < terms; ++term) {
      char edge[kLanes * 4] = {};
      const char* from = static_cast<const char*>(rows[term]) + k * size;
      if (k == whole) from = static_cast<char*>(std::memcpy(edge, from, (count - k) * size));
      total += load_row(from, element == 1, 0) * by[term];
    }
    store(sum + k, total);
  }
  if (element_out == 0)
    std::memcpy(out, sum, count * sizeof(float));
  else
    (element_out == 1 ? narrow_bfloat16 : narrow_float16)(sum, static_cast<uint16_t*>(out), count);
}

}  // namespace

extern const GramTable FASTKD_TABLE(gram);
const GramTable FASTKD_TABLE(gram) = {take,   add_scaled, shift,  place,  moments, combine,
                                      mirror, weigh,      finish, narrow, blend};
