// 1 - rho of two self-similarity matrices P (student) and Q (teacher), per group; neither is written anywhere.
//
// P = u uᵀ - mean with u = x / |x|. With c the mean row and v = u - c, the mean of u uᵀ is |c|², and exactly
//
//     P[i, j] = <v_i, v_j> + <c, v_i> + <c, v_j>,
//
// a sum of small numbers only: what all rows have in common, be it 200 times larger than what they have not, never
// meets a rounding. (bfloat16 rows are multiplied as they are instead, since v is not a bfloat16: <x_i, x_j> / |x_i|
// |x_j| - |c|², exact products and float32 sums, no worse than float32 arithmetic on them.)
//
//     rho = <P, Q> / (ab + eps), a = |P|, b = |Q|:   d(1 - rho)/dP = G = -Q / den + <P, Q> b / (a den²) P
//     d/du_i = 2 sum_j G[i, j] u_j = 2 (sum_j G[i, j] v_j + (sum_j G[i, j]) c)
//
// and along the sphere (d/dx is what is orthogonal to u, over |x|) c = u_i - v_i counts as -v_i, small again.
//
// G depends on nothing outside its group but a factor, so the gradient for upstream 1 is made in the forward, while P
// and Q are there, and saved (the student's size, in its dtype); the backward multiplies it. Recomputing them would be
// twice the work. A group of at most kWhole rows is one thread's, its P and Q (the upper triangle computed) in that
// thread's scratch; of longer ones the tiles are made again for the gradient, and the threads share the group. Sums are
// in an order that depends on shapes only.
#include "cpu/gram_side.h"

#include <array>
#include <memory>
#include <tuple>

#include "cpu/isa.h"

FASTKD_DECLARE(GramTable, gram);

namespace fastkd {
namespace {

constexpr int64_t kWhole = 512;
constexpr int64_t kTokenRows = 2, kSequenceRows = 3;  // fewer valid ones under a mask: the group does not count

struct Call {
  const GramTable& table;
  Side s, t;
  const bool* mask;
  int64_t mask_group, mask_row;
  int64_t groups, length;
  bool sequence;
  double eps;
  float* values;
  bool* valid;
  char* unit;  // the gradient for upstream 1 [B, N, D], or null
  int64_t unit_item;
};

// The rows of a group that count; none where there are too few.
std::vector<int64_t> kept_rows(const Call& call, int64_t group) {
  std::vector<int64_t> kept;
  kept.reserve(call.length);
  for (int64_t i = 0; i < call.length; ++i)
    if (!call.mask || call.mask[group * call.mask_group + i * call.mask_row]) kept.push_back(i);
  if (call.mask && int64_t(kept.size()) < (call.sequence ? kSequenceRows : kTokenRows)) kept.clear();
  return kept;
}

// G = of_p P + of_q Q, with the 2 of both of its halves.
struct Weights {
  float of_p, of_q;
};

using Sums = std::array<double, 3>;  // of P P, Q Q and P Q

Weights conclude(const Sums& sums, int64_t n, double eps, float* value) {
  const double ab = std::sqrt(sums[0] * sums[1]), den = ab + eps, a = std::sqrt(sums[0]), b = std::sqrt(sums[1]);
  *value = float((ab - sums[2] + eps) / den);
  if (n == 1) return {0, 0};  // what is left of P and Q is rounding
  return {a > 0 ? float(2 * sums[2] * b / (a * den * den)) : a == 0 ? 0.f : float(a), float(-2 / den)};
}

char* unit_row(const Call& call, int64_t group, int64_t i) {
  const int64_t b = call.sequence ? i : group, position = call.sequence ? group : i;
  const int64_t positions = call.sequence ? call.groups : call.length;
  return call.unit + (b * positions + position) * call.s.width * call.unit_item;
}

void write_zeros(const Call& call, int64_t group, const std::vector<int64_t>& kept) {
  if (!call.unit || int64_t(kept.size()) == call.length) return;
  size_t next = 0;
  for (int64_t i = 0; i < call.length; ++i) {
    if (next < kept.size() && kept[next] == i)
      ++next;
    else
      std::memset(unit_row(call, group, i), 0, call.s.width * call.unit_item);
  }
}

// What one thread needs: weights of some rows, their product with the rows, and its packed operand.
struct Scratch {
  float *pull, *u, *ones;
  char* packed;

  Scratch(Arena& arena, const Side& s, int64_t columns, int64_t ones_count) {
    pull = arena.take<float>(s.strip * s.padded);
    u = arena.take<float>(s.padded);
    packed = arena.take<char>(s.gemm.bytes_a(s.strip + s.gemm.rows_a, columns));
    ones = arena.take<float>(ones_count);
  }
};

// pull (+)= weights[rows, j..j_end) x rows j to j_end of the student; their sums are added up.
void pull_rows(const Side& s, float* weights, int64_t stride, int64_t rows, int64_t j, int64_t j_end, int64_t block,
               const Scratch& scratch, double* sums) {
  const int64_t columns = j_end - j;
  for (int64_t i = 0; i < rows; ++i) {
    const double sum = s.table.weigh(weights + i * stride, gram_padded(columns), s.raw ? s.scale + j : nullptr);
    sums[i] = j == 0 ? sum : sums[i] + sum;
  }
  s.gemm.pack_a({weights, kFloat32, stride, 1, rows, columns}, scratch.packed);
  s.gemm.tile(scratch.packed, s.piece(j, block), {rows, s.width, columns}, {scratch.pull, s.padded, 1, j > 0});
}

void finish_rows(const Call& call, int64_t group, const std::vector<int64_t>& kept, int64_t begin, int64_t end,
                 const Scratch& scratch, const double* sums) {
  const Side& s = call.s;
  for (int64_t i = begin; i < end; ++i) {
    float* pull = scratch.pull + (i - begin) * s.padded;
    for (int64_t k = s.width; k < s.padded; ++k) pull[k] = 0;
    const bool live = s.normalize && s.scale[i] < float(1 / kLeastNorm);
    const GramRow of = {s.row(i), s.raw ? nullptr : s.centre, s.raw, live, s.scale[i], float(sums[i - begin])};
    char* to = unit_row(call, group, kept[i]);
    const bool direct = call.unit_item == 4 && s.padded == s.width;
    call.table.finish(of, s.padded, pull, scratch.u, direct ? reinterpret_cast<float*>(to) : pull);
    if (call.unit_item == 2)
      call.table.narrow(pull, s.width, reinterpret_cast<uint16_t*>(to));
    else if (!direct)
      std::memcpy(to, pull, s.width * sizeof(float));
  }
}

// Groups of at most kWhole rows: P and Q lie in a scratch of their own, and the sides one after the other in another.
struct Whole {
  Call call;  // a copy: the sides point into this thread's scratch
  int64_t stride, block;
  Memory memory;
  float *p, *q;
  std::unique_ptr<Scratch> scratch;

  explicit Whole(const Call& of) : call(of), stride(gram_padded(of.length) + kSkew), block(gram_padded(of.length)) {
    memory.fill([&](Arena& arena) { carve(arena); });
    for (int64_t i = 0; i < stride; ++i) scratch->ones[i] = 1;
  }

  void carve(Arena& arena) {
    p = arena.take<float>(call.length * stride);
    q = arena.take<float>(call.length * stride);
    scratch.reset(new Scratch(arena, call.s, block, stride));
    Arena again = arena;
    call.t.carve(arena, 0);
    call.s.carve(again, call.unit ? block : 0);
    arena.used = arena.used > again.used ? arena.used : again.used;
  }

  void run(int64_t group) {
    const std::vector<int64_t> kept = kept_rows(call, group);
    const int64_t n = int64_t(kept.size()), strip = call.s.strip;
    write_zeros(call, group, kept);
    call.valid[group] = n > 0;
    call.values[group] = 0;
    if (n == 0) return;
    call.t.prepare(group, kept, false);
    each(false, n, call.t.strip,
         [&](int64_t i, int64_t end) { call.t.tile(i, end, i, n, scratch->ones, q + i * stride + i, stride); });
    call.s.prepare(group, kept, false);
    Sums sums = {};
    each(false, n, strip, [&](int64_t i, int64_t end) {
      const int64_t at = i * stride + i;
      call.s.tile(i, end, i, n, scratch->ones, p + at, stride);
      call.table.moments(p + at, q + at, stride, end - i, gram_padded(n - i), strip, sums.data());
    });
    const Weights weights = conclude(sums, n, call.eps, call.values + group);
    if (call.unit) gradient(group, kept, weights);
  }

  void gradient(int64_t group, const std::vector<int64_t>& kept, Weights weights) {
    const int64_t n = int64_t(kept.size());
    call.s.turn(n, block, false);
    each(false, n, call.s.strip, [&](int64_t i, int64_t end) {
      const int64_t at = i * stride + i;
      call.table.combine(p + at, q + at, stride, end - i, gram_padded(n - i), weights.of_p, weights.of_q);
      call.table.mirror(p, stride, i, end, n);
    });
    std::vector<double> sums(call.s.strip);
    each(false, n, call.s.strip, [&](int64_t i, int64_t end) {
      pull_rows(call.s, p + i * stride, stride, end - i, 0, n, block, *scratch, sums.data());
      finish_rows(call, group, kept, i, end, *scratch, sums.data());
    });
  }
};

// Longer groups, one after another: every thread takes strips of the same Gram, a tile of P and Q at a time.
struct Long {
  Call call;
  int64_t strip, columns;  // rows and columns of a tile
  Memory memory;

  explicit Long(const Call& of) : call(of), strip(of.s.strip), columns(16 * of.s.strip) {
    memory.fill([&](Arena& arena) {
      call.t.carve(arena, 0);
      call.s.carve(arena, call.unit ? columns : 0);
    });
  }

  // A thread's own tiles.
  struct Tiles {
    Memory memory;
    int64_t stride;
    float *p, *q;
    std::unique_ptr<Scratch> scratch;

    explicit Tiles(const Long& of) : stride(gram_padded(of.columns) + kSkew) {
      memory.fill([&](Arena& arena) {
        p = arena.take<float>(of.strip * stride);
        q = arena.take<float>(of.strip * stride);
        scratch.reset(new Scratch(arena, of.call.s, of.columns, of.call.length + kGramLanes));
      });
      for (int64_t i = 0; i < of.call.length + kGramLanes; ++i) scratch->ones[i] = 1;
    }
  };

  void make(Tiles& tiles, int64_t i, int64_t end, int64_t j, int64_t j_end) const {
    call.t.tile(i, end, j, j_end, tiles.scratch->ones, tiles.q, tiles.stride);
    call.s.tile(i, end, j, j_end, tiles.scratch->ones, tiles.p, tiles.stride);
  }

  void run(int64_t group) {
    const std::vector<int64_t> kept = kept_rows(call, group);
    const int64_t n = int64_t(kept.size());
    write_zeros(call, group, kept);
    call.valid[group] = n > 0;
    call.values[group] = 0;
    if (n == 0) return;
    call.t.prepare(group, kept, true);
    call.s.prepare(group, kept, true);
    const Weights weights = conclude(moments(n), n, call.eps, call.values + group);
    if (!call.unit) return;
    call.s.turn(n, columns, true);
    parallel_for(0, (n + strip - 1) / strip, 1, [&](int64_t first, int64_t last) {
      Tiles tiles(*this);
      for (int64_t at = first; at < last; ++at) gradient(group, kept, weights, at * strip, tiles);
    });
  }

  Sums moments(int64_t n) const {
    const int64_t strips = (n + strip - 1) / strip;
    std::vector<Sums> of_strip(strips);
    parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
      Tiles tiles(*this);
      for (int64_t at = first; at < last; ++at) {  // a long and a short one by turns: the upper triangle's strips
        const int64_t which = at % 2 ? strips - 1 - at / 2 : at / 2, i = which * strip;
        const int64_t end = i + strip < n ? i + strip : n;
        for (int64_t j = i; j < n; j += columns) {
          const int64_t j_end = j + columns < n ? j + columns : n;
          make(tiles, i, end, j, j_end);
          call.table.moments(tiles.p, tiles.q, tiles.stride, end - i, gram_padded(j_end - j), j == i ? strip : 0,
                             of_strip[which].data());
        }
      }
    });
    Sums sums = {};
    for (const Sums& part : of_strip)
      for (int k = 0; k < 3; ++k) sums[k] += part[k];
    return sums;
  }

  void gradient(int64_t group, const std::vector<int64_t>& kept, Weights weights, int64_t i, Tiles& tiles) const {
    const int64_t n = int64_t(kept.size()), end = i + strip < n ? i + strip : n;
    std::vector<double> sums(strip);
    for (int64_t j = 0; j < n; j += columns) {
      const int64_t j_end = j + columns < n ? j + columns : n;
      make(tiles, i, end, j, j_end);
      call.table.combine(tiles.p, tiles.q, tiles.stride, end - i, gram_padded(j_end - j), weights.of_p, weights.of_q);
      pull_rows(call.s, tiles.p, tiles.stride, end - i, j, j_end, columns, *tiles.scratch, sums.data());
    }
    finish_rows(call, group, kept, i, end, *tiles.scratch, sums.data());
  }
};

Tensor rows_side_by_side(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

struct Term {
  Tensor values, valid, unit;
};

Term term(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, bool sequence,
          bool normalize, double eps, bool with_gradient) {
  const Tensor s = rows_side_by_side(student), t = rows_side_by_side(teacher);
  const int64_t groups = s.size(sequence ? 1 : 0), length = s.size(sequence ? 0 : 1);
  Tensor values = torch::stable::new_empty(s, {groups}, ScalarType::Float);
  Tensor valid = torch::stable::new_empty(s, {groups}, ScalarType::Bool);
  const bool bfloat16 = s.scalar_type() == ScalarType::BFloat16;
  Tensor unit = torch::stable::new_empty(s, {s.size(0), with_gradient ? s.size(1) : 0, s.size(2)},
                                         bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  if (with_gradient) use_huge_pages(unit);
  const GramTable& table = FASTKD_CHOOSE(gram);
  Call call = {table,
               Side(table, s, sequence, normalize),
               Side(table, t, sequence, normalize),
               mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
               mask ? mask->stride(sequence ? 1 : 0) : 0,
               mask ? mask->stride(sequence ? 0 : 1) : 0,
               groups,
               length,
               sequence,
               eps,
               values.mutable_data_ptr<float>(),
               static_cast<bool*>(valid.mutable_data_ptr()),
               with_gradient ? static_cast<char*>(unit.mutable_data_ptr()) : nullptr,
               int64_t(unit.element_size())};
  Side::agree(call.s, call.t);
  if (length > kWhole) {
    Long work(call);
    for (int64_t group = 0; group < groups; ++group) work.run(group);
    return {values, valid, unit};
  }
  const int64_t worth = grain(length * length * (call.s.width + call.t.width), 1 << 20);
  parallel_for(0, groups, worth, [&](int64_t begin, int64_t end) {
    Whole work(call);
    for (int64_t group = begin; group < end; ++group) work.run(group);
  });
  return {values, valid, unit};
}

using Tensors = std::vector<Tensor>;

std::tuple<Tensors, Tensors, Tensors> gram_fwd(Tensors students, Tensors teachers, std::optional<Tensor> mask,
                                               std::vector<int64_t> levels, bool row, bool normalize, double eps,
                                               bool with_gradient) {
  Tensors values, valid, saved;
  for (size_t pair = 0; pair < students.size(); ++pair)
    for (int64_t level : levels) {
      STD_TORCH_CHECK(!row && level < 2, "gram: the C++ kernels correlate whole matrices, by position");
      const Term found = term(students[pair], teachers[pair], mask, level == 1, normalize, eps, with_gradient);
      values.push_back(found.values);
      valid.push_back(found.valid);
      if (with_gradient) saved.push_back(found.unit);
    }
  return {values, valid, saved};
}

// A sequence's or a position's upstream to every row of it: [B, N].
struct Upstream {
  const float* of_group;
  bool sequence;
};

Tensor gradient(const Tensor& student, const std::vector<Upstream>& upstream, const Tensor* units) {
  const GramTable& table = FASTKD_CHOOSE(gram);
  Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1), student.size(2)});
  use_huge_pages(grad);
  const int64_t positions = student.size(1), width = student.size(2), terms = int64_t(upstream.size());
  const int element_in = element_of(units[0]), element_out = element_of(grad);
  const int64_t row_in = width * int64_t(units[0].element_size()), row_out = width * int64_t(grad.element_size());
  auto* out = static_cast<char*>(grad.mutable_data_ptr());
  parallel_for(0, student.size(0) * positions, grain(width), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(gram_padded(width)), by(terms);
    std::vector<const void*> from(terms);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < terms; ++k) {
        by[k] = upstream[k].of_group[upstream[k].sequence ? i % positions : i / positions];
        from[k] = static_cast<const char*>(units[k].const_data_ptr()) + i * row_in;
      }
      table.blend(from.data(), element_in, by.data(), terms, width, sum.data(), element_out, out + i * row_out);
    }
  });
  return grad;
}

Tensors gram_bwd(Tensors grads, Tensors students, Tensors, std::optional<Tensor>, Tensors saved,
                 std::vector<int64_t> levels, bool, bool, double) {
  Tensors found;
  const size_t terms = levels.size();
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  for (size_t pair = 0; pair < students.size(); ++pair) {
    std::vector<Upstream> upstream;
    for (size_t k = 0; k < terms; ++k)
      upstream.push_back({grads[pair * terms + k].const_data_ptr<float>(), levels[k] == 1});
    found.push_back(gradient(students[pair], upstream, &saved[pair * terms]));
  }
  return found;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("gram_fwd", TORCH_BOX(&fastkd::gram_fwd));
  m.impl("gram_bwd", TORCH_BOX(&fastkd::gram_bwd));
}
