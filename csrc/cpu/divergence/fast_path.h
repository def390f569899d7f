// KL(p || q) and its gradient q - p of a row whose student and teacher differ much: two plain exponentials per token,
// each computed once and left in the cache until the gradient needs them. The row is read once, in chunks that stay in
// the first cache; every chunk has maxima of its own, so that nothing waits for those of the row.
//
// Subtracting q from p is safe here only because they differ. A row where that would lose digits is refused, and
// divergence/op_isa.cpp takes the accurate path. Only for divergence/op_isa.cpp, which has `sweep`.
#pragma once

namespace fastkd::divergence {

namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr int64_t kFastChunk = 128 * kLanes;  // tokens of a chunk: 8 KiB of each side at 16 lanes
constexpr double kSmallestKL = 0.1;           // nats: rows closer than this are refused

// Of one chunk, or of all so far, measured from their maxima: sums of e^s, of e^t, of e^t (s - t) and of e^t t.
struct ChunkSums {
  float max_s, max_t;
  double sum_s, sum_t, mean, entropy;
};

struct FastResult {
  bool refused;
  double kl, entropy;  // entropy of p, if asked for
  double log_sum_gap;  // T (logsumexp(s / T) - logsumexp(t / T)) as far as the row was read; NaN if it was not
};

// Smallest and largest of a chunk of s, largest of t.
inline void extremes(const float* s, const float* t, int64_t begin, int64_t end, float* low_s, ChunkSums* part) {
  vfloat low = splat(kInfinity), high_s = -low, high_t = -low;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const vfloat a = load(s + i), b = load(t + i);
    low = smaller(a, low);
    high_s = larger(a, high_s);
    high_t = larger(b, high_t);
  }
  *low_s = min_lanes(low);
  part->max_s = max_lanes(high_s);
  part->max_t = max_lanes(high_t);
  for (; i < end; ++i) {
    *low_s = s[i] < *low_s ? s[i] : *low_s;
    part->max_s = s[i] > part->max_s ? s[i] : part->max_s;
    part->max_t = t[i] > part->max_t ? t[i] : part->max_t;
  }
}

// Exponentials of a chunk, written to out_s and out_t where a gradient is wanted; the next chunk is fetched meanwhile.
template <bool kEntropy, bool kGradient>
inline void exponentials(const float* s, const float* t, int64_t begin, int64_t end, float per_two, float* out_s,
                         float* out_t, ChunkSums* part) {
  vfloat sums[6] = {};
  const float max_s = part->max_s, max_t = part->max_t;
  sweep(s, t, begin, end, [&](vfloat a, vfloat b, int64_t i, int count) {
    __builtin_prefetch(s + i + kFastChunk);
    __builtin_prefetch(t + i + kFastChunk);
    const vfloat x = larger(splat(-200.f), (a - max_s) * per_two), y = larger(splat(-200.f), (b - max_t) * per_two);
    const vfloat e_s = power_of_two(x), e_t = power_of_two(y);
    if constexpr (kEntropy) {  // both logarithms count: ones are summed separately, so that they round nothing away
      sums[0] += e_s == 1.f ? vfloat{} : e_s;
      sums[1] += e_t == 1.f ? vfloat{} : e_t;
      sums[3] += e_t * y;
      sums[4] += e_s == 1.f ? e_s : vfloat{};
      sums[5] += e_t == 1.f ? e_t : vfloat{};
    } else {
      sums[0] += e_s;
      sums[1] += e_t;
    }
    sums[2] += e_t * (x - y);
    if constexpr (kGradient) {
      store_some(out_s + i, e_s, count);
      store_some(out_t + i, e_t, count);
    }
  });
  part->sum_s = double(sum_lanes(sums[0])) + sum_lanes(sums[4]);
  part->sum_t = double(sum_lanes(sums[1])) + sum_lanes(sums[5]);
  part->mean = sum_lanes(sums[2]) * kLn2;
  part->entropy = sum_lanes(sums[3]) * kLn2;
}

inline double weight_below(double below) { return below == 0 ? 1 : std::exp(below); }

// What a part counts for when the maxima of the row are `row`'s: both sums rescaled, both means measured from there.
inline void add_chunk(const ChunkSums& part, double inverse_temperature, ChunkSums* row) {
  const double below_s = (double(part.max_s) - row->max_s) * inverse_temperature;
  const double below_t = (double(part.max_t) - row->max_t) * inverse_temperature;
  const double weight = weight_below(below_t);
  row->sum_s += part.sum_s * weight_below(below_s);
  row->sum_t += part.sum_t * weight;
  row->mean += weight * (part.mean + part.sum_t * (below_s - below_t));
  row->entropy += weight * (part.entropy + part.sum_t * below_t);
}

// KL(p || q) of sums that are measured from the row's maxima; negative where its digits are not worth much.
inline double kl_of(const ChunkSums& row) {
  const double kappa = std::log(row.sum_s / row.sum_t), mean = row.mean / row.sum_t, kl = kappa - mean;
  return kl > kSmallestKL && kl > 0.25 * (std::fabs(kappa) + std::fabs(mean)) ? kl : -1;
}

inline FastResult refuse(const ChunkSums& row, double inverse_temperature) {
  return {true, 0, 0, double(row.max_s) - row.max_t + std::log(row.sum_s / row.sum_t) / inverse_temperature};
}

// grad (or null) = (q - p) * scale. `scratch`: GradRequest::scratch_size(columns) floats where a gradient is wanted.
template <bool kEntropy, bool kGradient>
FastResult fast_forward(const float* s, const float* t, int64_t columns, float inverse_temperature, float scale,
                        float* grad, float* scratch, RowStats* stats) {
  const float per_two = inverse_temperature * kLog2E;
  float* maxima = scratch + columns;  // of s and t, per chunk
  ChunkSums row = {-kInfinity, -kInfinity, 0, 0, 0, 0};
  for (int64_t begin = 0, k = 0; begin < columns; begin += kFastChunk, ++k) {
    const int64_t end = begin + kFastChunk < columns ? begin + kFastChunk : columns;
    ChunkSums part;
    float low_s;
    extremes(s, t, begin, end, &low_s, &part);
    // Exponentials of tokens that the student all but excludes are 0, and their logarithms cannot be recovered.
    if (!((low_s - part.max_s) * per_two > -150.f) || !(part.max_t > -kInfinity))
      return refuse(row, inverse_temperature);
    exponentials<kEntropy, kGradient>(s, t, begin, end, per_two, grad, scratch, &part);
    if (kGradient) maxima[2 * k] = part.max_s, maxima[2 * k + 1] = part.max_t;
    const ChunkSums before = row;
    row = {std::fmax(before.max_s, part.max_s), std::fmax(before.max_t, part.max_t), 0, 0, 0, 0};
    if (k > 0) add_chunk(before, inverse_temperature, &row);
    add_chunk(part, inverse_temperature, &row);
    if (k == 0 && kl_of(row) < 0)
      return refuse(row, inverse_temperature);  // the first chunk refuses most of these rows
  }
  const double kl = kl_of(row);
  if (!(kl > 0)) return refuse(row, inverse_temperature);
  *stats = {row.max_s, row.max_t, float(row.sum_s), float(row.sum_t), float(std::log(row.sum_s / row.sum_t)), 0, 0};
  if constexpr (kGradient) {
    for (int64_t begin = 0, k = 0; begin < columns; begin += kFastChunk, ++k) {
      const int64_t end = begin + kFastChunk < columns ? begin + kFastChunk : columns;
      const double below_s = (double(maxima[2 * k]) - row.max_s) * inverse_temperature;
      const double below_t = (double(maxima[2 * k + 1]) - row.max_t) * inverse_temperature;
      const float of_s = float(scale * weight_below(below_s) / row.sum_s);
      const float of_t = float(scale * weight_below(below_t) / row.sum_t);
      sweep(grad, scratch, begin, end,
            [&](vfloat a, vfloat b, int64_t i, int count) { store_some(grad + i, a * of_s - b * of_t, count); });
    }
  }
  return {false, kl, std::log(row.sum_t) - row.entropy / row.sum_t, 0};
}

}  // namespace

}  // namespace fastkd::divergence
