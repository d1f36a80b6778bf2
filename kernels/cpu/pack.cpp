// Packs matrices once, at load: a block of 16 rows is widened, turned into words and transposed while it is in cache.
#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "linear.h"
#include "runtime.h"

#pragma GCC target("avx2,fma,f16c")
#include "simd.h"

namespace foveate {
namespace {

constexpr int kRows = 16;                // of a panel
constexpr std::int64_t kBlock = 256;     // of k at a time: a multiple of every group
constexpr std::int64_t kGroups[] = {1, 2, 128, 64, 128}, kPerWord[] = {1, 2, 4, 8, 2};  // of k, by form

struct half {
  std::uint16_t bits;
};

FOVEATE_INLINE float widened(float x) { return x; }
FOVEATE_INLINE float widened(bf16 x) { return to_float(x); }
FOVEATE_INLINE float widened(half x) { return _cvtsh_ss(x.bits); }

// Quantized values of one row's block and the scale of each group. int16: within -8191 and 8191; int8: -127 and 127.
// int4: the value farthest from zero becomes -8 exactly, whatever its sign, and all are stored + 8.
template <int Bits, class T>
void quantize(const float* x, std::int64_t k, T* to, float* scales) {
  constexpr std::int64_t group = Bits == 4 ? 64 : 128;
  constexpr float most = Bits == 16 ? 8191 : Bits == 8 ? 127 : 7, least = Bits == 4 ? -8 : -most;
  for (std::int64_t g = 0; g < k; g += group) {
    float low = 0, high = 0;
    for (std::int64_t i = g; i < g + group; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const float scale = Bits == 4 ? (high > -low ? high : low) / least : std::max(-low, high) / most;
    const float divisor = scale == 0 ? 1.0f : scale;
    for (std::int64_t i = g; i < g + group; ++i) {
      const float rounded = std::nearbyint(x[i] / divisor);
      to[i] = static_cast<T>(static_cast<int>(std::max(least, std::min(most, rounded))) + (Bits == 4 ? 8 : 0));
    }
    scales[g / group * kRows] = scale;
  }
}

// One row's block of k values (whole groups) to words; `scales` is its lane in the first of the block's groups.
void make_words(Form form, const float* x, std::int64_t k, std::uint32_t* to, float* scales) {
  if (form == Form::kFloat32) {
    std::memcpy(to, x, k * 4);
  } else if (form == Form::kBfloat16) {
    auto* pairs = reinterpret_cast<bf16*>(to);
    for (std::int64_t i = 0; i < k; ++i) set(pairs[i], x[i]);
  } else if (form == Form::kInt16) {
    quantize<16>(x, k, reinterpret_cast<std::int16_t*>(to), scales);
  } else if (form == Form::kInt8) {
    quantize<8>(x, k, reinterpret_cast<std::int8_t*>(to), scales);
  } else {
    std::int8_t values[kBlock];
    quantize<4>(x, k, values, scales);
    auto* bytes = reinterpret_cast<std::uint8_t*>(to);
    for (std::int64_t i = 0; i < k / 8; ++i)
      for (int j = 0; j < 4; ++j) bytes[i * 4 + j] = values[i * 8 + j] | values[i * 8 + 4 + j] << 4;
  }
}

template <class T>
void pack_panel(const T* from, std::int64_t stride, std::int64_t n_rows, std::int64_t k, Form form, std::uint32_t* data,
                float* scales) {
  const std::int64_t group = kGroups[int(form)], all = (k + group - 1) / group * group;
  alignas(64) float values[kBlock];
  alignas(64) std::uint32_t words[kRows][kBlock];
  for (std::int64_t k0 = 0; k0 < all; k0 += kBlock) {
    const std::int64_t size = std::min(kBlock, all - k0), there = std::clamp<std::int64_t>(k - k0, 0, size);
    const std::int64_t n_words = size / kPerWord[int(form)];
    for (int row = 0; row < kRows; ++row) {
      const std::int64_t have = row < n_rows ? there : 0;
      const T* at = from + row * stride + k0;
      for (std::int64_t i = 0; i < have; ++i) values[i] = widened(at[i]);
      std::fill(values + have, values + size, 0.0f);
      make_words(form, values, size, words[row], scales ? scales + k0 / group * kRows + row : nullptr);
    }
    std::uint32_t* to = data + k0 / kPerWord[int(form)] * kRows;
    for (std::int64_t i = 0; i < n_words; ++i)
      for (int row = 0; row < kRows; ++row) to[i * kRows + row] = words[row][i];
  }
}

template <class T>
void pack_all(const T* from, std::int64_t stride, std::int64_t n, std::int64_t k, Form form, std::uint32_t* data,
              float* scales, std::int64_t step) {
  const std::int64_t n_groups = (k + kGroups[int(form)] - 1) / kGroups[int(form)];
  const std::int64_t words = n_groups * kGroups[int(form)] / kPerWord[int(form)] * kRows;
  for_each((n + kRows - 1) / kRows, double(n) * k, [=](std::int64_t panel) {
    pack_panel(from + panel * kRows * stride, stride, std::min<std::int64_t>(kRows, n - panel * kRows), k, form,
               data + panel * step * words, scales ? scales + panel * step * n_groups * kRows : nullptr);
  });
}

}  // namespace

void pack(std::uintptr_t values, int source, std::int64_t stride, std::int64_t n, std::int64_t k, int form,
          std::uintptr_t data, std::uintptr_t scales, std::int64_t step) {
  const auto pack_as = [&](auto type) {
    pack_all(reinterpret_cast<const decltype(type)*>(values), stride, n, k, Form(form),
             reinterpret_cast<std::uint32_t*>(data), reinterpret_cast<float*>(scales), step);
  };
  switch (Source(source)) {
    case Source::kFloat32: return pack_as(float());
    case Source::kBfloat16: return pack_as(bf16());
    case Source::kFloat16: return pack_as(half());
  }
}

}  // namespace foveate
