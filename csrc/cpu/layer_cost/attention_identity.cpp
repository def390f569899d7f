// Attention scores compared without making them:
//
//     |S - T|^2 = <S, S> - 2 <S, T> + <T, T>,   <Q K^T, R L^T> = sum (Q^T R) o (K^T L):   d x d instead of S x S,
//
// and a student's gradient, sum of weight (S - T) K, from Q (K^T K) and R (L^T K). Where a student nears a teacher the
// first line cancels. So sums come with what rounding may have done to them, entry by entry: products of a chunk are
// float32 sums, whose errors are independent, of about eps sqrt(chunk) / 2 of the root of the squares summed; chunks
// are added up in double. The caller takes the scores where that is too much. Gradients cancel to first order only, but
// what rounding does to K^T K is the same for every query, while the errors of scores are independent and average out.
// So a student's gradients come with a doubt too. A causal mask is no product: its scores have to be made.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/layer_cost/attention_layers.h"
#include "cpu/layer_cost/space.h"
#include "cpu/simd/isa.h"

namespace fastkd::layer_cost {
namespace {

constexpr int64_t kChunk = 256;  // rows of a product that are added up in float32
constexpr int64_t kRowsAtOnce = 256;
constexpr double kPart =
    0.5 * 16 * 6e-8;  // error of one product's sum, of the root of the squares: sqrt(kChunk) eps / 2
constexpr double kSafety = 4;
constexpr double kGradientPart = 2 * kPart;      // of a student's own term, in its gradients
constexpr double kForward = 1.4, kBackward = 2;  // a product here costs as many of the scores', by measurement

using Matrix = std::vector<double>;  // [d of one layer, d of another]

// One side (queries or keys) of all layers in one unit, transposed and packed chunk by chunk.
class PackedChunks {
 public:
  int64_t rows = 0;
  std::vector<GemmSource> source;

  explicit PackedChunks(int layers) : source(layers), a_(layers), b_(layers) {}

  void pack(int l, const GemmSource& x) {
    const Gemm& product = gemm(kFloat32);
    source[l] = x;
    rows = x.rows;
    a_[l].resize(chunks());
    b_[l].resize(chunks());
    const int64_t item = x.element == kFloat32 ? 4 : 2;
    for (int64_t c = 0; c < chunks(); ++c) {
      const char* data = static_cast<const char*>(x.data) + c * kChunk * x.row_stride * item;
      const GemmSource part = transposed({data, x.element, x.row_stride, x.k_stride, length(c), x.k});
      a_[l][c].resize(product.bytes_a(part.rows, part.k));
      b_[l][c].resize(product.bytes_b(part.rows, part.k));
      product.pack_a(part, a_[l][c].data());
      product.pack_b(part, b_[l][c].data());
    }
  }

  // X_i^T X_j
  void multiply(int i, int j, Matrix& out) {
    const int64_t m = source[i].k, n = source[j].k;
    out.assign(m * n, 0.);
    tile_.resize(m * n);
    for (int64_t c = 0; c < chunks(); ++c) {
      gemm(kFloat32).tile(a_[i][c].data(), b_[j][c].data(), {m, n, length(c)}, {tile_.data(), n, 1.f, false});
      for (int64_t e = 0; e < m * n; ++e) out[e] += double(tile_[e]);
    }
  }

 private:
  std::vector<std::vector<std::vector<char>>> a_, b_;  // per layer, per chunk
  std::vector<float> tile_;

  int64_t chunks() const { return (rows + kChunk - 1) / kChunk; }
  int64_t length(int64_t c) const { return std::min(kChunk, rows - c * kChunk); }
};

// <S_i, S_j> of one unit, and the variance of its rounding.
struct Inner {
  double value = 0, variance = 0;
};

class IdentitySums : public AttentionUnit {
 public:
  IdentitySums(const AttentionShape& shape, const Layers& layers)
      : AttentionUnit(shape, layers),
        q_(layers.count()),
        k_(layers.count()),
        diagonal_q_(layers.count()),
        diagonal_k_(layers.count()),
        own_(layers.count()) {}

  void begin(int64_t unit) {
    AttentionUnit::begin(unit);
    for (int l = 0; valid && l < layers.count(); ++l) {
      q_.pack(l, queries_of(l, 0, shape.queries));
      k_.pack(l, keys_of(l));
      own_[l] = inner(l, l);
    }
  }
  // |S_i - T_j|^2 of this unit.
  Inner pair(int i, int j) {
    const int t = layers.students + j;
    const Inner both = inner(i, t);
    return {own_[i].value - 2 * both.value + own_[t].value, own_[i].variance + 4 * both.variance + own_[t].variance};
  }

 private:
  PackedChunks q_, k_;
  std::vector<std::vector<double>> diagonal_q_, diagonal_k_;  // squares of the columns
  std::vector<Inner> own_;
  Matrix of_q_, of_k_;

  Inner inner(int i, int j) {
    q_.multiply(i, j, of_q_);
    k_.multiply(i, j, of_k_);
    const int64_t m = layers.q[i].width, n = layers.q[j].width;
    if (i == j) {
      diagonal_q_[i].resize(m);
      diagonal_k_[i].resize(m);
      for (int64_t c = 0; c < m; ++c) diagonal_q_[i][c] = of_q_[c * m + c], diagonal_k_[i][c] = of_k_[c * m + c];
    }
    Inner found;
    for (int64_t x = 0; x < m; ++x)
      for (int64_t y = 0; y < n; ++y) {
        const double q = of_q_[x * n + y], k = of_k_[x * n + y];
        found.value += q * k;
        found.variance += diagonal_q_[i][x] * diagonal_q_[j][y] * k * k + diagonal_k_[i][x] * diagonal_k_[j][y] * q * q;
      }
    const double scale = double(layers.scale[i]) * layers.scale[j];
    found.value *= scale;
    found.variance *= scale * scale * kPart * kPart;
    return found;
  }
};

double squares(const std::vector<float>& x) {
  return std::accumulate(x.begin(), x.end(), 0., [](double sum, float e) { return sum + double(e) * e; });
}

// The gradients of one student in one unit: sum over layers of c_l X_l (Y_l^T Y_i), for queries X and keys Y, and with
// the two exchanged. The first layer is the student itself: where the others cancel its term, its rounding is left.
struct SquaredNorms {
  double own = 0, all = 0;  // of the first term, and of the gradient
};
class IdentityGradient {
 public:
  const std::vector<float>& run(PackedChunks& x, PackedChunks& y, int i, const std::vector<int>& of,
                                const std::vector<float>& weights, SquaredNorms& found) {
    const Gemm& product = gemm(kFloat32);
    const int64_t width = x.source[i].k, rows = x.rows;
    out_.assign(rows * width, 0.f);
    for (size_t c = 0; c < of.size(); ++c) {
      const GemmSource& from = x.source[of[c]];
      y.multiply(of[c], i, between_);
      narrow_.assign(between_.begin(), between_.end());
      packed_.resize(product.bytes_b(width, from.k));
      product.pack_b({narrow_.data(), kFloat32, 1, width, width, from.k}, packed_.data());
      const int64_t item = from.element == kFloat32 ? 4 : 2;
      for (int64_t begin = 0; begin < rows; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, rows - begin);
        const char* data = static_cast<const char*>(from.data) + begin * from.row_stride * item;
        workspace_.resize(product.bytes_a(count, from.k));
        product.pack_a({data, from.element, from.row_stride, from.k_stride, count, from.k}, workspace_.data());
        product.tile(workspace_.data(), packed_.data(), {count, width, from.k},
                     {out_.data() + begin * width, width, weights[c], true});
      }
      if (c == 0) found.own = squares(out_);
    }
    found.all = squares(out_);
    return out_;
  }

 private:
  Matrix between_;
  std::vector<float> narrow_, out_;
  std::vector<char> packed_, workspace_;
};

}  // namespace

bool identity_is_cheaper(const AttentionShape& shape, const Layers& layers) {
  if (shape.causal) return false;
  double widths = 0, own = 0, students = 0, teachers = 0;
  for (int l = 0; l < layers.count(); ++l) {
    const double d = double(layers.q[l].width);
    widths += d;
    own += d * d;
    (l < layers.students ? students : teachers) += d;
  }
  const double pairs = double(layers.students) * layers.teachers;
  const double by_scores = double(shape.queries) * shape.keys * (widths + pairs);
  const double by_identity = double(shape.queries + shape.keys) * (own + students * teachers);
  return kForward * by_identity < by_scores;
}

bool identity_is_cheaper(const AttentionShape& shape, const Layers& layers,
                         const std::vector<WeightedTeachers>& teachers_of) {
  if (shape.causal) return false;
  double widths = 0, of_products = 0;
  for (int i = 0; i < layers.students; ++i) {
    if (teachers_of[i].teacher.empty()) continue;
    const double d = double(layers.q[i].width);
    widths += 3 * d;
    of_products += 2 * d * d;
    for (const int j : teachers_of[i].teacher) {
      widths += layers.q[layers.students + j].width + 1.;
      of_products += 2 * d * layers.q[layers.students + j].width;
    }
  }
  const double by_scores = double(shape.queries) * shape.keys * widths;
  return kBackward * double(shape.queries + shape.keys) * of_products < by_scores;
}

void identity_sums(const AttentionShape& shape, const Layers& layers, double* sums, double* error_bounds) {
  const int m = layers.teachers;
  const int64_t pairs = int64_t(layers.students) * m;
  std::vector<Inner> partial(shape.units() * pairs);
  parallel_for(0, shape.units(), 1, [&](int64_t first, int64_t last) {
    IdentitySums unit(shape, layers);
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u);
      for (int64_t pair = 0; unit.valid && pair < pairs; ++pair)
        partial[u * pairs + pair] = unit.pair(int(pair / m), int(pair % m));
    }
  });
  for (int64_t pair = 0; pair < pairs; ++pair) {
    Inner total;
    for (int64_t u = 0; u < shape.units(); ++u) {
      total.value += partial[u * pairs + pair].value;
      total.variance += partial[u * pairs + pair].variance;
    }
    sums[pair] = total.value;
    error_bounds[pair] = kSafety * std::sqrt(total.variance);
  }
}

std::vector<bool> identity_gradients(const AttentionShape& shape, const Layers& layers,
                                     const std::vector<WeightedTeachers>& teachers_of,
                                     const std::vector<GradientOutput>& to_q, const std::vector<GradientOutput>& to_k) {
  const int n = layers.students;
  std::vector<SquaredNorms> of_q(shape.units() * n), of_k(shape.units() * n);
  const std::vector<bool> used = used_layers(teachers_of, layers.teachers);
  const Table& table = chosen_table();
  parallel_for(0, shape.units(), 1, [&](int64_t first, int64_t last) {
    AttentionUnit unit(shape, layers);
    PackedChunks q(layers.count()), k(layers.count());
    IdentityGradient gradient;
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u);
      for (int l = 0; unit.valid && l < layers.count(); ++l) {
        if (!used[l]) continue;
        q.pack(l, unit.queries_of(l, 0, shape.queries));
        k.pack(l, unit.keys_of(l));
      }
      for (int i = 0; i < n; ++i) {
        std::vector<int> of{i};
        std::vector<float> weights{0.f};
        const float scale = layers.scale[i];
        for (size_t p = 0; p < teachers_of[i].teacher.size(); ++p) {
          of.push_back(n + teachers_of[i].teacher[p]);
          weights.push_back(-teachers_of[i].weight[p] * scale * layers.scale[of.back()]);
          weights[0] += teachers_of[i].weight[p] * scale * scale;
        }
        const bool any = unit.valid && used[i];
        const std::vector<float> nothing(any ? 0 : shape.queries * layers.q[i].width, 0.f);
        const float* rows = any ? gradient.run(q, k, i, of, weights, of_q[u * n + i]).data() : nothing.data();
        for (int64_t s = 0; s < shape.queries; ++s)
          to_q[i].write(table, unit.b, unit.h, s, rows + s * layers.q[i].width);
        to_k[i].write_keys(table, unit, any ? gradient.run(k, q, i, of, weights, of_k[u * n + i]).data() : nullptr);
      }
    }
  });
  std::vector<bool> inaccurate(n);
  for (int i = 0; i < n; ++i)
    for (const auto* side : {&of_q, &of_k}) {
      SquaredNorms total;
      for (int64_t u = 0; u < shape.units(); ++u)
        total.own += (*side)[u * n + i].own, total.all += (*side)[u * n + i].all;
      if (!(kGradientPart * kGradientPart * total.own <= kTrusted * kTrusted * total.all)) inaccurate[i] = true;
    }
  return inaccurate;
}

}  // namespace fastkd::layer_cost
