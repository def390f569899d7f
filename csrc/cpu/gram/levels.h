// What an op of gram is called with, and the work that its ops share: all levels of a pair of layers (gram/op.cpp).
#pragma once

#include "cpu/gram/args.h"

namespace fastkd::gram {

using Tensors = std::vector<Tensor>;

enum Level : int64_t { kToken, kSequence, kOfficial };

// What an op was asked for, whatever the pair.
struct Args {
  std::optional<Tensor> mask;
  std::vector<int64_t> levels;
  bool row, normalize;
  double eps;
};

// A gradient per level (for upstream 1), or one of all levels together, or none; and the upstream of every level.
struct GradRequest {
  Tensors out;
  std::vector<Upstream> upstream;
};

// Checks pairs of layers [B, N, D], D each its own, and the arguments.
void check_args(const Check& check, const Tensors& students, const Tensors& teachers, const Args& args);

// Checks what goes with the values of every term: [G], or row by row [G, R].
void check_terms(const Check& check, const char* name, const Tensors& xs, unsigned dtype, const Tensors& students,
                 const Args& args);

// Uninitialised: float32 where the student is float16, whose range a gradient may leave before it is unscaled.
Tensor gradient_like(const Tensor& student);

// 1 - rho and whether it counts for all levels of a pair of layers, one after another, and the gradients requested.
void all_levels(const Args& args, const Tensor& student, const Tensor& teacher, GradRequest& request, Tensors* values,
                Tensors* valid);

// The upstream gradients of all levels of a pair.
std::vector<Upstream> upstream_of(const Tensors& grads, size_t pair, size_t levels);

// The gradient of all levels together, computed again for the upstream gradient that came.
Tensor recompute(const Args& args, const Tensor& student, const Tensor& teacher, std::vector<Upstream> upstream);

}  // namespace fastkd::gram
