// Vectors of W floats (8 on AVX2, 16 on AVX-512) and the functions the kernels share, written once for both with the
// compiler's own vector types. Include it only after `#pragma GCC target(...)`, and after the standard headers: what is
// compiled for one instruction set must not be shared with code for another, so all is in an unnamed namespace.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace foveate {
namespace {

template <int W>
struct Simd {
  typedef float F __attribute__((vector_size(W * 4)));
  typedef std::int32_t I __attribute__((vector_size(W * 4)));
  typedef std::uint16_t H __attribute__((vector_size(W * 2)));
};
template <int W>
using vf = typename Simd<W>::F;
template <int W>
using vi = typename Simd<W>::I;

// bfloat16 in memory: the upper half of a float.
struct bf16 {
  std::uint16_t bits;
};

#define FOVEATE_INLINE inline __attribute__((always_inline))

template <int W>
FOVEATE_INLINE vf<W> load(const float* p) {
  vf<W> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int W>
FOVEATE_INLINE vf<W> load(const bf16* p) {
  // One instruction, where the generic conversion takes five.
  if constexpr (W == 16)
    return (vf<W>)((vi<W>)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256((const __m256i*)p)) << 16);
  else
    return (vf<W>)((vi<W>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
}

template <int W>
FOVEATE_INLINE void store(float* p, vf<W> v) {
  std::memcpy(p, &v, sizeof v);
}

// Rounds to the nearest, ties to even; a NaN stays one.
template <int W>
FOVEATE_INLINE void store(bf16* p, vf<W> v) {
  const vi<W> bits = (vi<W>)v;
  const vi<W> rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const vi<W> chosen = v == v ? rounded : ((bits >> 16) | 0x40);
  const auto half = __builtin_convertvector(chosen, typename Simd<W>::H);
  std::memcpy(p, &half, sizeof half);
}

template <int W>
FOVEATE_INLINE vf<W> set1(float x) {
  return x - vf<W>{};
}

FOVEATE_INLINE float to_float(float x) { return x; }
FOVEATE_INLINE float to_float(bf16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
FOVEATE_INLINE void set(float& to, float x) { to = x; }
FOVEATE_INLINE void set(bf16& to, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

template <int W>
FOVEATE_INLINE float sum(vf<W> v) {
  float lanes[W], total = 0;
  std::memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  total = lanes[0];
  return total;
}

template <int W>
FOVEATE_INLINE vf<W> max(vf<W> a, vf<W> b) {
  return a > b ? a : b;
}

// e^x within 2 ulp; 0 below -87, finite above 88.
template <int W>
FOVEATE_INLINE vf<W> exp(vf<W> x) {
  const vf<W> inside = x < 88.0f ? (x > -87.0f ? x : set1<W>(-87.0f)) : set1<W>(88.0f);
  const vf<W> magic = set1<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf<W> shifted = inside * 1.44269504f + magic;
  const vf<W> n = shifted - magic;
  const vf<W> r = inside - n * 0.693359375f + n * 2.12194440e-4f;
  vf<W> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi<W> exponent = ((vi<W>)shifted - (vi<W>)magic + 127) << 23;
  const vf<W> result = p * (vf<W>)exponent;
  return x < -87.0f ? vf<W>{} : result;
}

template <int W>
FOVEATE_INLINE vf<W> sigmoid(vf<W> x) {
  return 1.0f / (1.0f + exp<W>(-x));
}

template <int W>
FOVEATE_INLINE vf<W> silu(vf<W> x) {
  return x * sigmoid<W>(x);
}

template <int W>
FOVEATE_INLINE vf<W> quick_gelu(vf<W> x) {
  return x * sigmoid<W>(1.702f * x);
}

template <int W>
FOVEATE_INLINE vf<W> gelu_tanh(vf<W> x) {  // x/2 (1 + tanh u) = x sigmoid(2u)
  return x * sigmoid<W>(1.5957691216f * (x + 0.044715f * x * x * x));
}

// x Phi(x), with erf by Abramowitz and Stegun 7.1.26 (error below 1.5e-7).
template <int W>
FOVEATE_INLINE vf<W> gelu(vf<W> x) {
  const vf<W> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const vf<W> t = 1.0f / (1.0f + 0.3275911f * z);
  vf<W> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf<W> tail = p * t * exp<W>(-z * z);  // erfc(z)
  return x * 0.5f * (x < 0.0f ? tail : 2.0f - tail);
}

}  // namespace
}  // namespace foveate
