// InfoNCE's gradient of the bank, where negatives are trained too (in-batch negatives: the bank is the other
// positives).
//
//     d loss / d bank_k = sum_b c_b e^(n_bk - lse_b) query_b,   c = upstream * sigmoid(lse - p) / T.
//
// Scores are formed again, a block of the bank against a panel of queries; no K x B matrix exists. Every block of the
// bank belongs to one thread, and panels are added in order: bitwise the same for any number of threads.
#include <vector>

#include "cpu/contrast/op.h"
#include "cpu/contrast/rows.h"
#include "cpu/gemm/gemm.h"
#include "cpu/simd/isa.h"

namespace fastkd::contrast {
namespace {

constexpr int64_t kBlock = 128;  // rows of the bank

// A panel of queries, packed for both products and followed by what its lanes need.
struct Panels {
  const Gemm& gemm;
  int64_t count, score_bytes, sum_bytes;
  std::vector<char> scores, sums;

  Panels(const Gemm& gemm, const float* query, int64_t queries, int64_t padded, int64_t width)
      : gemm(gemm), count((queries + kPanel - 1) / kPanel) {
    score_bytes = gemm.bytes_b(kPanel, width), sum_bytes = gemm.bytes_b(width, kPanel);
    scores.resize(count * score_bytes + 64), sums.resize(count * sum_bytes + 64);
    for (int64_t p = 0; p < count; ++p) {
      const float* rows = query + p * kPanel * padded;
      const int64_t here = std::min(kPanel, queries - p * kPanel);
      gemm.pack_b({rows, kFloat32, padded, 1, here, width}, scores.data() + p * score_bytes);
      gemm.pack_b({rows, kFloat32, 1, padded, width, here}, sums.data() + p * sum_bytes);
    }
  }
};

Tensor info_nce_bank_bwd(const Tensor& query, const Tensor& bank, const Tensor& inverse_temperature,
                         std::optional<Tensor> query_ids, std::optional<Tensor> bank_ids, const Tensor& lse,
                         const Tensor& coefficient) {
  const Check check("info_nce_bank_bwd");
  check_bank(check, query, bank, std::nullopt);
  check("inverse_temperature", inverse_temperature, kF64, "[]", {});
  check_ids(check, query, bank, query_ids, bank_ids);
  check("lse", lse, kF32, "[B]", {query.size(0)});
  check("coefficient", coefficient, kF32, "[B]", {query.size(0)});
  const Table& table = chosen_table();
  const Gemm& gemm = fastkd::gemm(kFloat32);
  const Tensor q = with_contiguous_rows(query), n = with_contiguous_rows(bank);
  if (query_ids) query_ids = torch::stable::contiguous(*query_ids);
  if (bank_ids) bank_ids = torch::stable::contiguous(*bank_ids);
  const int64_t queries = q.size(0), width = q.size(1), padded = padded_width(width), rows = n.size(0);
  std::vector<float> floats(queries * padded);
  for (int64_t i = 0; i < queries; ++i) float_row(table, q, i, floats.data() + i * padded);
  const Panels panels(gemm, floats.data(), queries, padded, width);
  std::vector<float> shift(panels.count * kPanel), factor(panels.count * kPanel);  // 0 where there is no query
  std::copy_n(torch::stable::contiguous(lse).const_data_ptr<float>(), queries, shift.data());
  std::copy_n(torch::stable::contiguous(coefficient).const_data_ptr<float>(), queries, factor.data());
  const float alpha = float(*inverse_temperature.const_data_ptr<double>());
  Tensor out = torch::stable::new_empty(bank, {rows, width}, ScalarType::Float);
  float* gradient = out.mutable_data_ptr<float>();
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  parallel_for(0, blocks, grain(kBlock * padded * panels.count, 1 << 16), [&](int64_t block, int64_t end) {
    std::vector<float> own(kBlock * padded), scores(kBlock * kPanel);
    std::vector<char> packed(std::max(gemm.bytes_a(kBlock, width), gemm.bytes_a(kBlock, kPanel)) + 64);
    for (; block < end; ++block) {
      const int64_t first = block * kBlock, keys = std::min(kBlock, rows - first);
      for (int64_t j = 0; j < keys; ++j) float_row(table, n, first + j, own.data() + j * padded);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t here = std::min(kPanel, queries - p * kPanel);
        std::fill(scores.begin(), scores.end(), 0.f);
        gemm.tile_direct(own.data(), padded, panels.scores.data() + p * panels.score_bytes, {keys, here, width},
                         {scores.data(), kPanel, alpha, false});
        if (bank_ids)
          table.exclude_ids(scores.data(), keys, here, query_ids->const_data_ptr<int64_t>() + p * kPanel,
                            bank_ids->const_data_ptr<int64_t>() + first);
        table.softmax_gradient(scores.data(), keys, shift.data() + p * kPanel, factor.data() + p * kPanel);
        gemm.pack_a({scores.data(), kFloat32, kPanel, 1, keys, here}, packed.data());
        gemm.tile(packed.data(), panels.sums.data() + p * panels.sum_bytes, {keys, width, here},
                  {gradient + first * width, width, 1.f, p > 0});
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace fastkd::contrast

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("info_nce_bank_bwd", TORCH_BOX(&fastkd::contrast::info_nce_bank_bwd));
}
