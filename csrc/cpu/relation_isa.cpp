// Softmaxes of both sides down the columns of a tile; the mathematics is in relation.cpp.
#include "cpu/relation.h"

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace {

static_assert(kRelationLanes % kLanes == 0, "queries must be whole vectors");

constexpr float kNever = -1e30f;  // finite, so that the difference of two such scores is a number
constexpr int64_t kRun = 64;      // rows that are summed before they meet the others

void hide(const RelationTile& at) {
  for (int64_t key = 1; key < at.keys; ++key)
    for (int64_t i = 0; i < key && i < at.queries; ++i) at.s[key * at.stride + i] = at.t[key * at.stride + i] = kNever;
}

// Of one vector of queries.
struct Column {
  vfloat max_t, max_s;

  vfloat teacher(vfloat b) const { return exp(b - max_t); }  // e^t, <= 1
  vfloat shifted(vfloat a, vfloat b) const { return (a - b) - (max_s - max_t); }
  vfloat student(vfloat a) const { return a - max_s; }
};

Column maxima(const RelationTile& at, int64_t lane) {
  Column found = {splat(-kInfinity), splat(-kInfinity)};
  for (int64_t key = 0; key < at.keys; ++key) {
    found.max_t = larger(found.max_t, load(at.t + key * at.stride + lane));
    found.max_s = larger(found.max_s, load(at.s + key * at.stride + lane));
  }
  return found;
}

template <bool kKeep>
void statistics_of(const RelationTile& at, const RelationStats& of, float* values, int64_t lane) {
  const Column column = maxima(at, lane);
  vfloat sum_t = {}, excess = {}, bregman = {};
  for (int64_t begin = 0; begin < at.keys; begin += kRun) {
    const int64_t end = begin + kRun < at.keys ? begin + kRun : at.keys;
    vfloat run_t = {}, run_excess = {}, run_bregman = {};
    for (int64_t key = begin; key < end; ++key) {
      float *s = at.s + key * at.stride + lane, *t = at.t + key * at.stride + lane;
      const vfloat a = load(s), b = load(t), e = column.teacher(b), c = column.shifted(a, b);
      const vint near = c < 1.f;
      const Exponential x = exponential(near ? c : column.student(a));
      const vfloat difference = near ? e * x.expm1() : x.exp() - e;
      run_t += e;
      run_excess += difference;
      run_bregman += magnitude(c) < 1.f ? e * x.expm1_minus_x() : difference - e * c;  // expm1(c) - c > 0 has no limit
      if constexpr (kKeep) {
        store(t, e);
        store(s, difference);
      }
    }
    sum_t += run_t, excess += run_excess, bregman += run_bregman;
  }
  store(of.max_t + lane, column.max_t);
  store(of.max_s + lane, column.max_s);
  store(of.sum_t + lane, sum_t);
  store(of.excess + lane, excess);
  store(values + lane, bregman / sum_t - logarithm(excess / sum_t).y_minus_log1p);
}

void statistics(const RelationTile& at, bool keep, const RelationStats& of, float* values) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes)
    keep ? statistics_of<true>(at, of, values, lane) : statistics_of<false>(at, of, values, lane);
}

// q - p = (e_s - e_t) / sum_s - e_t (sum_s - sum_t) / (sum_t sum_s): both small where q is near p.
void from_kept(const RelationTile& at, const RelationStats& of, const float* g) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    const vfloat sum_t = load(of.sum_t + lane), excess = load(of.excess + lane);
    const vfloat of_difference = load(g + lane) / (sum_t + excess), of_teacher = -excess / sum_t * of_difference;
    for (int64_t key = 0; key < at.keys; ++key) {
      float* s = at.s + key * at.stride + lane;
      store(s, load(s) * of_difference + load(at.t + key * at.stride + lane) * of_teacher);
    }
  }
}

void from_scores(const RelationTile& at, const RelationStats& of, const float* g) {
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    const Column column = {load(of.max_t + lane), load(of.max_s + lane)};
    const vfloat sum_t = load(of.sum_t + lane), excess = load(of.excess + lane);
    const vfloat p_scale = load(g + lane) / sum_t, q_scale = load(g + lane) / (sum_t + excess);
    const vfloat kappa = logarithm(excess / sum_t).log1p;
    for (int64_t key = 0; key < at.keys; ++key) {
      float* s = at.s + key * at.stride + lane;
      const vfloat a = load(s), b = load(at.t + key * at.stride + lane);
      const vfloat p = column.teacher(b) * p_scale, d = column.shifted(a, b) - kappa;
      const vint near = d < 1.f;
      const Exponential x = exponential(near ? d : column.student(a));
      store(s, near ? p * x.expm1() : x.exp() * q_scale - p);
    }
  }
}

void narrow(const float* in, int64_t count, uint16_t* out) { narrow_bfloat16(in, out, count); }

void multiply(const void* in, bool bfloat16, float by, int64_t count, void* out) {
  if (!bfloat16) {
    const auto* from = static_cast<const float*>(in);
    auto* to = static_cast<float*>(out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] * by;
    return;
  }
  constexpr int64_t kBlock = 256;
  float scratch[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    widen_bfloat16(static_cast<const uint16_t*>(in) + i, scratch, size);
    for (int64_t k = 0; k < size; ++k) scratch[k] *= by;
    narrow_bfloat16(scratch, static_cast<uint16_t*>(out) + i, size);
  }
}

}  // namespace

extern const RelationTable FASTKD_TABLE(relation);
const RelationTable FASTKD_TABLE(relation) = {hide, statistics, from_kept, from_scores, narrow, multiply};
