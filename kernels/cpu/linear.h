#pragma once
#include <cstdint>

#include "runtime.h"

namespace foveate {

enum class Form : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3, kInt16 = 4 };
enum class Activation : int { kNone = 0, kSilu = 1, kQuickGelu = 2, kGeluTanh = 3, kGelu = 4, kSiluGate = 5 };

// out = activation(x W^T + bias) + residual, in float32; strides are in values. The layouts of `data` and `scales` are
// told in kernels/cpu/weights.py.
struct Linear {
  const float* x;  // [m, k], rows packed inside
  std::int64_t x_stride;
  std::int64_t m, n, k;  // W is [n, k]
  const void* data;
  const float* scales;  // of the integer forms
  Form form;
  bool round_inputs;
  const float* bias;      // [n], or null
  const float* residual;  // [m, width of out], or null
  std::int64_t residual_stride;
  Activation activation;
  float* out;  // [m, n], or [m, n / 2] behind a gate; packed
};

// Levels whose results have been found wrong on this machine; `linear` runs what is below them.
extern bool linear_distrusted[kLevels];

// At the level in force; a row's result does not depend on the rows beside it.
void linear(const Linear& problem);

// Each level's own; a level has an entry for what it does better than the one below.
void linear_avx2(const Linear& problem);
void linear_avx512(const Linear& problem);
void linear_avx512_bf16(const Linear& problem);  // only bfloat16 with inputs that may be rounded
void linear_amx(const Linear& problem);          // the same, with k divisible by 32; int8 and int4

}  // namespace foveate
