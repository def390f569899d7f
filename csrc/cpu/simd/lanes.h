// Floats in a vector of this unit's instruction set. Only for *_isa.cpp units: internal linkage, as in simd/vec.h.
#pragma once

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

}  // namespace
