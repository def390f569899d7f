// Which GEMM runs, and the tile as an op of its own (gemm_nt), so that it can be tested and measured from Python.
#include "cpu/gemm/gemm.h"

#include "cpu/runtime/scratch.h"
#include "cpu/simd/isa.h"

namespace fastkd {

const Gemm& gemm(int element, bool float32_only) {
  const GemmTable& table = chosen_gemm_table();
  return element == kBFloat16 && !float32_only && has_fast_avx512_bf16() ? table.bfloat16 : table.float32;
}

namespace {

// Bits of `how`, the same as in fastkd/ops/gemm.py.
constexpr int64_t kDirect = 1;         // read `a` where it lies
constexpr int64_t kFloat32Only = 2;    // widen bfloat16 even where it need not be
constexpr int64_t kRound = 4;          // round float32 to bfloat16 where the machine multiplies that
constexpr int64_t kSplit = 8;          // ... `a` in two parts
constexpr int64_t kRowBlock = 128;     // rows of A packed at once: they stay in L2
constexpr int64_t kColumnBlock = 512;  // rows of B that a tile sees at once
constexpr int64_t kAtLeast = 1 << 20;  // multiplications that are worth waking a thread for

struct Operands {
  const Gemm& gemm;
  GemmSource a, b;
  GemmShape shape;
  GemmOut out;
  bool direct, split;
  char *packed_a, *packed_b;
};

GemmSource rows_from(const GemmSource& x, int64_t begin, int64_t end, int bytes_per_element) {
  GemmSource part = x;
  part.data = (const char*)x.data + begin * x.row_stride * bytes_per_element;
  part.rows = end - begin;
  return part;
}

int element_bytes(const GemmSource& x) { return x.element == kFloat32 || x.element == kGemmLowPart ? 4 : 2; }

GemmSource source(const Tensor& x) {
  return {x.const_data_ptr(), element_of(x), x.stride(0), x.stride(1), x.size(0), x.size(1)};
}

void multiply(const Operands& o, const void* a, int64_t begin, int64_t end, bool accumulate) {
  const int64_t n = o.shape.n, k = o.shape.k, block = kColumnBlock / o.gemm.rows_b * o.gemm.rows_b;
  for (int64_t j = 0; j < n; j += block) {
    const GemmShape shape = {end - begin, n - j < block ? n - j : block, k};
    const GemmOut out = {o.out.data + begin * n + j, n, o.out.alpha, accumulate};
    const char* b = o.packed_b + o.gemm.bytes_b(j, k);
    if (o.direct)
      o.gemm.tile_direct(a, o.a.row_stride, b, shape, out);
    else
      o.gemm.tile(a, b, shape, out);
  }
}

void row_block(const Operands& o, int64_t begin, int64_t end) {
  GemmSource rows = rows_from(o.a, begin, end, element_bytes(o.a));
  if (o.direct) return multiply(o, rows.data, begin, end, o.out.accumulate);
  char* packed = o.packed_a + o.gemm.bytes_a(begin, o.shape.k);
  o.gemm.pack_a(rows, packed);
  multiply(o, packed, begin, end, o.out.accumulate);
  if (!o.split) return;
  rows.element = kGemmLowPart;
  o.gemm.pack_a(rows, packed);
  multiply(o, packed, begin, end, true);
}

void run(const Operands& o) {
  const int64_t mr = o.gemm.rows_a, nr = o.gemm.rows_b, m = o.shape.m, n = o.shape.n, k = o.shape.k;
  parallel_for(0, (n + nr - 1) / nr, grain(nr * k), [&](int64_t first, int64_t last) {
    const int64_t begin = first * nr, end = last * nr < n ? last * nr : n;
    o.gemm.pack_b(rows_from(o.b, begin, end, element_bytes(o.b)), o.packed_b + o.gemm.bytes_b(begin, k));
  });
  parallel_for(0, (m + mr - 1) / mr, grain(mr * n * k, kAtLeast), [&](int64_t first, int64_t last) {
    const int64_t end = last * mr < m ? last * mr : m, block = kRowBlock / mr * mr;
    for (int64_t i = first * mr; i < end; i += block) row_block(o, i, end - i < block ? end : i + block);
  });
}

Tensor gemm_nt(const Tensor& a, const Tensor& b, const std::optional<Tensor>& start, double alpha, int64_t how) {
  const Check check("gemm_nt");
  check("a", a, kFloating, "[M, K]", {kAny, kAny});
  check("b", b, dtype_of(a), "[N, K]", {kAny, a.size(1)});
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  check("start", start, kF32, "[M, N]", {m, n});
  Tensor out = torch::stable::new_empty(a, {m, n}, ScalarType::Float);
  if (start) torch::stable::copy_(out, *start);
  if (m == 0 || n == 0) return out;
  const int element = element_of(a);
  const Gemm& chosen = gemm(how & kRound ? (int)kBFloat16 : element, how & kFloat32Only);
  const bool direct = how & kDirect, split = (how & kSplit) && chosen.operand == kBFloat16 && element == kFloat32;
  STD_TORCH_CHECK(
      !direct || (chosen.operand == element && (k <= 1 || a.stride(1) == 1)),
      "gemm_nt: a: reading it in place needs a contiguous last axis and a dtype that is multiplied unconverted");
  const Scratch packed_a(a, direct ? 0 : chosen.bytes_a(m, k)), packed_b(a, chosen.bytes_b(n, k));
  run({chosen,
       source(a),
       source(b),
       {m, n, k},
       {out.mutable_data_ptr<float>(), n, (float)alpha, start.has_value()},
       direct,
       split,
       packed_a.get(),
       packed_b.get()});
  return out;
}

int64_t chosen_instruction_set() { return instruction_set(); }

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // The chosen instruction set, as a number; see isa.h.
  m.def("instruction_set() -> int");
  // alpha * a [M, K] x b [N, K]^T + start [M, N], in float32: the shared CPU tile by itself, for tests and the bench.
  m.def("gemm_nt(Tensor a, Tensor b, Tensor? start=None, float alpha=1.0, int how=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fastkd::chosen_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("gemm_nt", TORCH_BOX(&fastkd::gemm_nt)); }
