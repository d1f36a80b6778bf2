#pragma once
#include <cstdint>

namespace foveate {

// rows: addresses of n rows of float32[vocab]. Per row the index of its largest value, the lowest of equal ones, and
// whether all values are finite.
void largest(std::uintptr_t rows, std::int64_t n, std::int64_t vocab, std::uintptr_t ids, std::uintptr_t finite);

// One token per row by the law of kernels/draw.py. laws: float64 [n, 4], temperature, top-k (0: off), top-p,
// min-p; keys: int64 [n, 3], 32 bits each, of the noise; ids: int64 [n].
void draw(std::uintptr_t rows, std::int64_t n, std::int64_t vocab, std::uintptr_t laws, std::uintptr_t keys,
          std::uintptr_t ids);

}  // namespace foveate
