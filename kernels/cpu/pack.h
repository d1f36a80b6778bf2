#pragma once
#include <cstdint>

namespace foveate {

// What the values of a matrix are stored as before it is packed.
enum class Source : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Packs n rows of k values, `stride` values apart, into panels as kernels/cpu/weights.py tells, padded with zeros. Panel i
// goes to place i * step of `data`, and of `scales` (of the integer forms; else 0). `form` is linear.h's.
void pack(std::uintptr_t values, int source, std::int64_t stride, std::int64_t n, std::int64_t k, int form,
          std::uintptr_t data, std::uintptr_t scales, std::int64_t step);

}  // namespace foveate
