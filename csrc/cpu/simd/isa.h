// One translation unit per instruction set, chosen at run time.
//
// <stem>_isa.cpp is compiled three times, with FASTKD_ISA = plain, avx2, avx512. It includes no torch header, keeps
// everything in an anonymous namespace (a weak symbol would let the linker mix instruction sets) and exports one table
// of function pointers:
//
//     const ProbeTable FASTKD_TABLE(probe) = {row_sums};
//
// <stem>.cpp declares the tables with FASTKD_DECLARE and picks one with FASTKD_CHOOSE.
#pragma once

#define FASTKD_PASTE2(a, b) a##_##b
#define FASTKD_PASTE(a, b) FASTKD_PASTE2(a, b)
#define FASTKD_TABLE(stem) FASTKD_PASTE(fastkd_##stem, FASTKD_ISA)

#if defined(FASTKD_X86)
#define FASTKD_DECLARE(Table, stem) \
  extern const Table fastkd_##stem##_plain, fastkd_##stem##_avx2, fastkd_##stem##_avx512
#define FASTKD_CHOOSE(stem)                                    \
  (::fastkd::instruction_set() == 2   ? fastkd_##stem##_avx512 \
   : ::fastkd::instruction_set() == 1 ? fastkd_##stem##_avx2   \
                                      : fastkd_##stem##_plain)
#else
#define FASTKD_DECLARE(Table, stem) extern const Table fastkd_##stem##_plain
#define FASTKD_CHOOSE(stem) (fastkd_##stem##_plain)
#endif

namespace fastkd {

// 2 = AVX-512 (F, BW, VL, DQ), 1 = AVX2 + FMA, 0 = whatever the compiler's baseline is.
// FASTKD_MAX_ISA=plain|avx2 in the environment lowers it, so that every path can be tested on one machine.
int instruction_set();

// Finer features that some kernels use within the AVX-512 path.
bool has_avx512_bf16();
bool has_amx_bf16();

}  // namespace fastkd
