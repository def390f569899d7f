// The same numbers from the side of the features, where a group has more rows than the two sides have features: of
// z = (v, w), a student's and a teacher's centred row side by side, only H = zᵀ z [features, features] is needed.
//
// With M = vᵀ v, C = vᵀ w and K = wᵀ w in H, o_i = <c, v_i> less its mean, r_i the teacher's, and sums of v, w, o and r
// that are 0,
//
//     <P, P> = |M|² + 2 n |o|²,   <Q, Q> = |K|² + 2 n |r|²,   <P, Q> = |C|² + 2 n <o, r>
//     P v = v M + 1 (vᵀ o)ᵀ,   Q v = w Cᵀ + 1 (vᵀ r)ᵀ,   row sums of P: n o,   of Q: n r.
//
// Centred rows are what makes it safe: nothing here is a difference of large numbers. Blocks of rows are summed in
// float32, blocks in double.
#pragma once

#include <cstring>
#include <memory>

#include "cpu/gram/args.h"

namespace fastkd::gram {

constexpr int64_t kBlockRows = 1024;

struct Features {
  Term call;  // both sides as floats
  int64_t wide, stride, strip, columns, block;
  Memory memory;
  float *rows, *wanted;
  char *packed_a, *packed_b, *weights;
  double *h, *onto_s, *onto_t;

  explicit Features(const Term& of)
      : call(of),
        wide(of.s.padded + of.t.padded),
        stride(wide + kSkew),
        strip(2 * of.s.strip),
        columns(16 * of.s.strip),
        block(kBlockRows < of.length ? kBlockRows : of.length) {
    memory.fill([&](Arena& arena) { carve(arena); });
  }

  void carve(Arena& arena) {
    const Gemm& gemm = call.s.gemm;
    call.s.carve_means(arena);
    call.t.carve_means(arena);
    rows = arena.take<float>(block * stride);
    packed_a = arena.take<char>(gemm.bytes_a(wide + gemm.rows_a, block));
    packed_b = arena.take<char>(gemm.bytes_b(wide + columns, block));
    h = arena.take<double>(wide * wide);
    onto_s = arena.take<double>(call.length);
    onto_t = arena.take<double>(call.length);
    wanted = arena.take<float>(call.out ? call.s.width * wide : 0);
    weights = arena.take<char>(call.out ? gemm.bytes_b(call.s.width, wide) : 0);
  }

  float* row(int64_t i) const { return rows + i * stride; }

  // Rows [begin, end) of the group, z; `f(i, i_end)` follows for some of them at a time.
  template <class F>
  void fill(int64_t group, const std::vector<int64_t>& kept, int64_t begin, int64_t end, const F& f) {
    each(true, end - begin, call.s.chunk, [&](int64_t first, int64_t last) {
      for (int64_t i = begin + first; i < begin + last; ++i) {
        onto_s[i] = call.s.shift_row(call.s.given(group, kept[i]), i, false, row(i - begin));
        onto_t[i] = call.t.shift_row(call.t.given(group, kept[i]), i, false, row(i - begin) + call.s.padded);
      }
      f(begin + first, begin + last);
    });
  }

  void run(int64_t group) {
    const std::vector<int64_t> kept = call.mask.kept(group);
    const int64_t n = int64_t(kept.size());
    write_zeros(call, group, kept);
    call.valid[group] = n > 0;
    call.values[group] = 0;
    if (n == 0) return;
    for (GroupRows* side : {&call.s, &call.t}) {
      side->scale_and_sum(group, kept, true);
      side->mean(group, kept);
    }
    const std::vector<float> pulls = multiply_all(group, kept);
    const Weights w = correlate(group, n);
    if (call.out) gradient(group, kept, n == 1 ? Weights{} : w, pulls);
  }

  // H, and vᵀ o and vᵀ r of every chunk of rows.
  std::vector<float> multiply_all(int64_t group, const std::vector<int64_t>& kept) {
    const int64_t n = int64_t(kept.size()), chunk = call.s.chunk, padded = call.s.padded;
    std::vector<float> pulls((n + chunk - 1) / chunk * 2 * padded);
    std::memset(h, 0, wide * wide * sizeof(double));
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = begin + block < n ? begin + block : n;
      fill(group, kept, begin, end, [&](int64_t i, int64_t i_end) {
        float* pull = pulls.data() + i / chunk * 2 * padded;
        for (; i < i_end; ++i) {
          call.table.add_scaled(row(i - begin), false, float(onto_s[i]), padded, pull);
          call.table.add_scaled(row(i - begin), false, float(onto_t[i]), padded, pull + padded);
        }
      });
      multiply(end - begin);
    }
    return pulls;
  }

  // H += zᵀ z over a block of rows, upper triangle in strips.
  void multiply(int64_t count) {
    const Gemm& gemm = call.s.gemm;
    each(true, wide, strip, [&](int64_t i, int64_t end) {
      const GemmSource source = {rows + i, kFloat32, 1, stride, end - i, count};
      gemm.pack_a(source, packed_a + gemm.bytes_a(i, count));
      gemm.pack_b(source, packed_b + gemm.bytes_b(i, count));
    });
    const int64_t strips = (wide + strip - 1) / strip;
    parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
      std::vector<float> tile(strip * columns);
      for (int64_t at = first; at < last; ++at) {  // a long and a short one by turns
        const int64_t i = (at % 2 ? strips - 1 - at / 2 : at / 2) * strip, end = i + strip < wide ? i + strip : wide;
        for (int64_t j = i; j < wide; j += columns) {
          const int64_t j_end = j + columns < wide ? j + columns : wide;
          gemm.tile(packed_a + gemm.bytes_a(i, count), packed_b + gemm.bytes_b(j, count), {end - i, j_end - j, count},
                    {tile.data(), columns, 1, false});
          for (int64_t k = i; k < end; ++k)
            call.table.accumulate(tile.data() + (k - i) * columns, j_end - j, h + k * wide + j);
        }
      }
    });
  }

  // The sum of squares of H[i, j] for rows [i, i_end) and columns [j, j_end), of which those below the diagonal are
  // not there and those above it count twice where the block is symmetric.
  double squares(int64_t i, int64_t i_end, int64_t j, int64_t j_end, bool symmetric) const {
    double total = 0;
    for (; i < i_end; ++i) {
      double sum = 0;
      for (int64_t k = symmetric ? i + 1 : j; k < j_end; ++k) sum += h[i * wide + k] * h[i * wide + k];
      total += symmetric ? 2 * sum + h[i * wide + i] * h[i * wide + i] : sum;
    }
    return total;
  }

  Weights correlate(int64_t group, int64_t n) {
    const int64_t padded = call.s.padded;
    double mean_s = 0, mean_t = 0, oo = 0, rr = 0, ro = 0;
    for (int64_t i = 0; i < n; ++i) {
      mean_s += onto_s[i] / double(n);
      mean_t += onto_t[i] / double(n);
    }
    for (int64_t i = 0; i < n; ++i) {
      const double o = onto_s[i] -= mean_s, r = onto_t[i] -= mean_t;
      oo += o * o;
      rr += r * r;
      ro += r * o;
    }
    const double twice = 2 * double(n);
    return conclude(
        squares(0, padded, 0, padded, true) + twice * oo, squares(padded, wide, padded, wide, true) + twice * rr,
        squares(0, padded, padded, wide, false) + twice * ro, call.eps, call.upstream[group], call.values + group);
  }

  void gradient(int64_t group, const std::vector<int64_t>& kept, Weights of, const std::vector<float>& pulls) {
    const int64_t n = int64_t(kept.size()), padded = call.s.padded, width = call.s.width;
    const Gemm& gemm = call.s.gemm;
    for (int64_t i = 0; i < width; ++i)  // both halves of W + Wᵀ
      for (int64_t k = 0; k < wide; ++k)
        wanted[i * wide + k] =
            float(k < padded ? 2 * of.of_p * h[(k < i ? k * wide + i : i * wide + k)] : 2 * of.of_q * h[i * wide + k]);
    gemm.pack_b({wanted, kFloat32, wide, 1, width, wide}, weights);
    std::vector<float> lean(padded);
    for (int64_t k = 0; k < padded; ++k) {
      double o = 0, r = 0;
      for (size_t at = 0; at < pulls.size(); at += 2 * padded) {
        o += pulls[at + k];
        r += pulls[at + padded + k];
      }
      lean[k] = float(2 * (of.of_p * o + of.of_q * r));
    }
    const std::vector<double> o(onto_s, onto_s + n), r(onto_t, onto_t + n);
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = begin + block < n ? begin + block : n;
      fill(group, kept, begin, end, [&](int64_t i, int64_t i_end) {
        Memory own;
        std::unique_ptr<Scratch> scratch;
        own.fill([&](Arena& arena) { scratch.reset(new Scratch(arena, call.s, call.s.chunk, 0, 0)); });
        for (int64_t k = 0; k < i_end - i; ++k) std::memcpy(scratch->pull + k * padded, lean.data(), padded * 4);
        gemm.tile_direct(row(i - begin), stride, weights, {i_end - i, width, wide}, {scratch->pull, padded, 1, true});
        std::vector<double> sums(i_end - i);
        for (int64_t k = i; k < i_end; ++k) sums[k - i] = 2 * double(n) * (of.of_p * o[k] + of.of_q * r[k]);
        finish_rows(call, group, kept, i, i_end, reinterpret_cast<const char*>(row(i - begin)), stride * 4, *scratch,
                    sums.data());
      });
    }
  }
};

}  // namespace fastkd::gram
