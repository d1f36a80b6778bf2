#pragma once
#include <cstdint>

namespace foveate {

// All tensors are float32 at the given addresses; strides are in values, rows are packed inside. out is packed.

// out = x / rms(x) * weight over n rows of d values.
void rms_norm(std::uintptr_t x, std::int64_t stride, std::uintptr_t weight, std::uintptr_t out, std::int64_t n,
              std::int64_t d, float eps);

// The same around the mean, with a bias.
void layer_norm(std::uintptr_t x, std::int64_t stride, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out,
                std::int64_t n, std::int64_t d, float eps);

// Turns, in place, the pairs (i, i + half) of the first `heads` heads of every row by the row's angles.
// x: n rows, heads of 2 * half values side by side; cos, sin [n, half].
void rotate(std::uintptr_t x, std::int64_t stride, std::uintptr_t cos, std::uintptr_t sin, std::int64_t n,
            std::int64_t heads, std::int64_t half);

// Rows of k and v, `width` values each, into the slots [n] int64 of flat key and value blocks of T.
void store_float32(std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride,
                   std::uintptr_t slots, std::uintptr_t keys, std::uintptr_t values, std::int64_t n,
                   std::int64_t width);
void store_bfloat16(std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride,
                    std::uintptr_t slots, std::uintptr_t keys, std::uintptr_t values, std::int64_t n,
                    std::int64_t width);

}  // namespace foveate
