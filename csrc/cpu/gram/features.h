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
  Term term;  // both sides as floats
  int64_t wide, stride, strip, columns, block;
  Workspace workspace;
  float *rows, *coefficients;
  char *packed_a, *packed_b, *weights;
  double *h, *onto_s, *onto_t;

  explicit Features(const Term& of)
      : term(of),
        wide(of.s.padded + of.t.padded),
        stride(wide + kSkew),
        strip(2 * of.s.strip),
        columns(16 * of.s.strip),
        block(kBlockRows < of.length ? kBlockRows : of.length) {
    workspace.allocate([&](Arena& arena) { lay_out(arena); });
  }

  void lay_out(Arena& arena) {
    const Gemm& gemm = term.s.gemm;
    term.s.lay_out_means(arena);
    term.t.lay_out_means(arena);
    rows = arena.piece<float>(block * stride);
    packed_a = arena.piece<char>(gemm.bytes_a(wide + gemm.rows_a, block));
    packed_b = arena.piece<char>(gemm.bytes_b(wide + columns, block));
    h = arena.piece<double>(wide * wide);
    onto_s = arena.piece<double>(term.length);
    onto_t = arena.piece<double>(term.length);
    coefficients = arena.piece<float>(term.out ? term.s.width * wide : 0);
    weights = arena.piece<char>(term.out ? gemm.bytes_b(term.s.width, wide) : 0);
  }

  float* row(int64_t i) const { return rows + i * stride; }

  // Rows [begin, end) of the group, z; `f(i, i_end)` follows for some of them at a time.
  template <class F>
  void fill(int64_t group, const std::vector<int64_t>& valid, int64_t begin, int64_t end, const F& f) {
    each(true, end - begin, term.s.chunk, [&](int64_t first, int64_t last) {
      for (int64_t i = begin + first; i < begin + last; ++i) {
        onto_s[i] = term.s.shift_row(term.s.source_row(group, valid[i]), i, false, row(i - begin));
        onto_t[i] = term.t.shift_row(term.t.source_row(group, valid[i]), i, false, row(i - begin) + term.s.padded);
      }
      f(begin + first, begin + last);
    });
  }

  void run(int64_t group) {
    const std::vector<int64_t> valid = term.mask.valid_rows(group);
    const int64_t n = int64_t(valid.size());
    write_zeros(term, group, valid);
    term.valid[group] = n > 0;
    term.values[group] = 0;
    if (n == 0) return;
    for (GroupRows* side : {&term.s, &term.t}) {
      side->scale_and_sum(group, valid, true);
      side->mean(group, valid);
    }
    const std::vector<float> products = multiply_all(group, valid);
    const Weights w = correlate(group, n);
    if (term.out) gradient(group, valid, n == 1 ? Weights{} : w, products);
  }

  // H, and vᵀ o and vᵀ r of every chunk of rows.
  std::vector<float> multiply_all(int64_t group, const std::vector<int64_t>& valid) {
    const int64_t n = int64_t(valid.size()), chunk = term.s.chunk, padded = term.s.padded;
    std::vector<float> products((n + chunk - 1) / chunk * 2 * padded);
    std::memset(h, 0, wide * wide * sizeof(double));
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = begin + block < n ? begin + block : n;
      fill(group, valid, begin, end, [&](int64_t i, int64_t i_end) {
        float* product = products.data() + i / chunk * 2 * padded;
        for (; i < i_end; ++i) {
          term.table.add_scaled_row(row(i - begin), false, float(onto_s[i]), padded, product);
          term.table.add_scaled_row(row(i - begin), false, float(onto_t[i]), padded, product + padded);
        }
      });
      multiply(end - begin);
    }
    return products;
  }

  // H += zᵀ z over a block of rows, upper triangle in strips.
  void multiply(int64_t count) {
    const Gemm& gemm = term.s.gemm;
    each(true, wide, strip, [&](int64_t i, int64_t end) {
      const GemmSource source = {rows + i, kFloat32, 1, stride, end - i, count};
      gemm.pack_a(source, packed_a + gemm.bytes_a(i, count));
      gemm.pack_b(source, packed_b + gemm.bytes_b(i, count));
    });
    const int64_t strips = (wide + strip - 1) / strip;
    parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
      std::vector<float> tile(strip * columns);
      for (int64_t at = first; at < last; ++at) {  // alternately a long and a short strip
        const int64_t i = (at % 2 ? strips - 1 - at / 2 : at / 2) * strip, end = i + strip < wide ? i + strip : wide;
        for (int64_t j = i; j < wide; j += columns) {
          const int64_t j_end = j + columns < wide ? j + columns : wide;
          gemm.tile(packed_a + gemm.bytes_a(i, count), packed_b + gemm.bytes_b(j, count), {end - i, j_end - j, count},
                    {tile.data(), columns, 1, false});
          for (int64_t k = i; k < end; ++k)
            term.table.add_to_float64(tile.data() + (k - i) * columns, j_end - j, h + k * wide + j);
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
    const int64_t padded = term.s.padded;
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
    return value_and_weights(
        squares(0, padded, 0, padded, true) + twice * oo, squares(padded, wide, padded, wide, true) + twice * rr,
        squares(0, padded, padded, wide, false) + twice * ro, term.eps, term.upstream[group], term.values + group);
  }

  void gradient(int64_t group, const std::vector<int64_t>& valid, Weights of, const std::vector<float>& products) {
    const int64_t n = int64_t(valid.size()), padded = term.s.padded, width = term.s.width;
    const Gemm& gemm = term.s.gemm;
    for (int64_t i = 0; i < width; ++i)  // both halves of W + Wᵀ
      for (int64_t k = 0; k < wide; ++k)
        coefficients[i * wide + k] =
            float(k < padded ? 2 * of.of_p * h[(k < i ? k * wide + i : i * wide + k)] : 2 * of.of_q * h[i * wide + k]);
    gemm.pack_b({coefficients, kFloat32, wide, 1, width, wide}, weights);
    std::vector<float> constant_part(padded);
    for (int64_t k = 0; k < padded; ++k) {
      double o = 0, r = 0;
      for (size_t at = 0; at < products.size(); at += 2 * padded) {
        o += products[at + k];
        r += products[at + padded + k];
      }
      constant_part[k] = float(2 * (of.of_p * o + of.of_q * r));
    }
    const std::vector<double> o(onto_s, onto_s + n), r(onto_t, onto_t + n);
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = begin + block < n ? begin + block : n;
      fill(group, valid, begin, end, [&](int64_t i, int64_t i_end) {
        Workspace own;
        std::unique_ptr<GradientBuffers> scratch;
        own.allocate([&](Arena& arena) { scratch.reset(new GradientBuffers(arena, term.s, term.s.chunk, 0, 0)); });
        for (int64_t k = 0; k < i_end - i; ++k)
          std::memcpy(scratch->product + k * padded, constant_part.data(), padded * 4);
        gemm.tile_direct(row(i - begin), stride, weights, {i_end - i, width, wide},
                         {scratch->product, padded, 1, true});
        std::vector<double> sums(i_end - i);
        for (int64_t k = i; k < i_end; ++k) sums[k - i] = 2 * double(n) * (of.of_p * o[k] + of.of_q * r[k]);
        finish_rows(term, group, valid, i, i_end, reinterpret_cast<const char*>(row(i - begin)), stride * 4, *scratch,
                    sums.data());
      });
    }
  }
};

}  // namespace fastkd::gram
