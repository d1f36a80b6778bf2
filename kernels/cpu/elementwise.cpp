// Norms and rotary embedding over float32 rows. Their cost is memory traffic, so AVX2 serves every level.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "elementwise.h"
#include "runtime.h"

#pragma GCC target("avx2,fma,f16c")
#include "simd.h"

namespace foveate {
namespace {

constexpr int W = 8;

// One row of keys or values into its slot, converted.
template <class T>
void copy_row(const float* from, T* to, std::int64_t d) {
  std::int64_t i = 0;
  for (; i + W <= d; i += W) store<W>(to + i, load<W>(from + i));
  for (; i < d; ++i) set(to[i], from[i]);
}

template <class T>
void store_rows(std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride, std::uintptr_t slots,
                std::uintptr_t keys, std::uintptr_t values, std::int64_t n, std::int64_t width) {
  for_each(n, 2.0 * n * width, [=](std::int64_t i) {
    const std::int64_t slot = reinterpret_cast<const std::int64_t*>(slots)[i];
    if (slot < 0) return;  // it is there already
    copy_row(reinterpret_cast<const float*>(k) + i * k_stride, reinterpret_cast<T*>(keys) + slot * width, width);
    copy_row(reinterpret_cast<const float*>(v) + i * v_stride, reinterpret_cast<T*>(values) + slot * width, width);
  });
}

}  // namespace

void rms_norm(std::uintptr_t x, std::int64_t stride, std::uintptr_t weight, std::uintptr_t out, std::int64_t n,
              std::int64_t d, float eps) {
  const auto* w = reinterpret_cast<const float*>(weight);
  for_each(n, double(n) * d, [=](std::int64_t row) {
    const auto* in = reinterpret_cast<const float*>(x) + row * stride;
    auto* to = reinterpret_cast<float*>(out) + row * d;
    vf<W> squares[2] = {};
    std::int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W)
      for (int j : {0, 1}) {
        const vf<W> v = load<W>(in + i + j * W);
        squares[j] += v * v;
      }
    float total = sum<W>(squares[0] + squares[1]);
    for (std::int64_t rest = i; rest < d; ++rest) total += in[rest] * in[rest];
    const float scale = 1.0f / std::sqrt(total / d + eps);
    for (i = 0; i + W <= d; i += W) store<W>(to + i, load<W>(in + i) * scale * load<W>(w + i));
    for (; i < d; ++i) to[i] = in[i] * scale * w[i];
  });
}

void layer_norm(std::uintptr_t x, std::int64_t stride, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out,
                std::int64_t n, std::int64_t d, float eps) {
  const auto* w = reinterpret_cast<const float*>(weight);
  const auto* b = reinterpret_cast<const float*>(bias);
  for_each(n, double(n) * d, [=](std::int64_t row) {
    const auto* in = reinterpret_cast<const float*>(x) + row * stride;
    auto* to = reinterpret_cast<float*>(out) + row * d;
    vf<W> sums = {};
    std::int64_t i = 0;
    for (; i + W <= d; i += W) sums += load<W>(in + i);
    float total = sum<W>(sums);
    for (; i < d; ++i) total += in[i];
    const float mean = total / d;
    vf<W> squares = {};
    for (i = 0; i + W <= d; i += W) {
      const vf<W> v = load<W>(in + i) - mean;
      squares += v * v;
    }
    float variance = sum<W>(squares);
    for (; i < d; ++i) variance += (in[i] - mean) * (in[i] - mean);
    const float scale = 1.0f / std::sqrt(variance / d + eps);
    for (i = 0; i + W <= d; i += W) store<W>(to + i, (load<W>(in + i) - mean) * scale * load<W>(w + i) + load<W>(b + i));
    for (; i < d; ++i) to[i] = (in[i] - mean) * scale * w[i] + b[i];
  });
}

void rotate(std::uintptr_t x, std::int64_t stride, std::uintptr_t cos, std::uintptr_t sin, std::int64_t n,
            std::int64_t heads, std::int64_t half) {
  for_each(n, double(n) * heads * half * 4, [=](std::int64_t row) {
    const auto* c = reinterpret_cast<const float*>(cos) + row * half;
    const auto* s = reinterpret_cast<const float*>(sin) + row * half;
    for (std::int64_t head = 0; head < heads; ++head) {
      auto* low = reinterpret_cast<float*>(x) + row * stride + head * 2 * half;
      auto* high = low + half;
      std::int64_t i = 0;
      for (; i + W <= half; i += W) {
        const vf<W> a = load<W>(low + i), b = load<W>(high + i), cs = load<W>(c + i), sn = load<W>(s + i);
        store<W>(low + i, a * cs - b * sn);
        store<W>(high + i, b * cs + a * sn);
      }
      for (; i < half; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a * c[i] - b * s[i];
        high[i] = b * c[i] + a * s[i];
      }
    }
  });
}

void store_float32(std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride,
                   std::uintptr_t slots, std::uintptr_t keys, std::uintptr_t values, std::int64_t n,
                   std::int64_t width) {
  store_rows<float>(k, k_stride, v, v_stride, slots, keys, values, n, width);
}

void store_bfloat16(std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride,
                    std::uintptr_t slots, std::uintptr_t keys, std::uintptr_t values, std::int64_t n,
                    std::int64_t width) {
  store_rows<bf16>(k, k_stride, v, v_stride, slots, keys, values, n, width);
}

}  // namespace foveate
