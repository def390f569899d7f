// One translation unit per instruction set, chosen at run time.
//
// <name>_isa.cpp is compiled three times, with FASTKD_ISA = plain, avx2, avx512. It includes no torch header, keeps
// everything in an anonymous namespace (a weak symbol would let the linker mix instruction sets) and exports one table
// of function pointers, in the namespace of its stem:
//
//     const Table FASTKD_TABLE(table) = {row_sums};
//
// The header beside it says what a Table holds, and FASTKD_DECLARE_TABLE(Table, table). The units that are compiled
// once then call chosen_table(), which is the table for the instruction set of this machine.
#pragma once

#define FASTKD_PASTE2(a, b) a##_##b
#define FASTKD_PASTE(a, b) FASTKD_PASTE2(a, b)
#define FASTKD_TABLE(name) FASTKD_PASTE(name, FASTKD_ISA)

#if defined(FASTKD_ISA)
#define FASTKD_DECLARE_TABLE(Table, name) extern const Table FASTKD_TABLE(name)
#elif defined(FASTKD_X86)
#define FASTKD_DECLARE_TABLE(Table, name)                      \
  extern const Table name##_plain, name##_avx2, name##_avx512; \
  inline const Table& chosen_##name() {                        \
    return ::fastkd::instruction_set() == 2   ? name##_avx512  \
           : ::fastkd::instruction_set() == 1 ? name##_avx2    \
                                              : name##_plain;  \
  }                                                            \
  static_assert(true)
#else
#define FASTKD_DECLARE_TABLE(Table, name)                      \
  extern const Table name##_plain;                             \
  inline const Table& chosen_##name() { return name##_plain; } \
  static_assert(true)
#endif

namespace fastkd {

// 2 = AVX-512 (F, BW, VL, DQ), 1 = AVX2 + FMA, 0 = whatever the compiler's baseline is.
// FASTKD_MAX_ISA=plain|avx2 in the environment lowers it, so that every path can be tested on one machine.
int instruction_set();

// Used by some kernels within the AVX-512 path.
bool has_fast_avx512_bf16();

}  // namespace fastkd
