// Found in place of the compiler's <immintrin.h>: the AVX-512, VNNI, BF16 and AMX intrinsics that the kernels use, lane
// by lane, so that a machine without those instructions runs the same sources. The rest of the header is the compiler's
// own, and an intrinsic missing here does not compile. Semantics as in Intel's Software Developer's Manual, volume 2.
//
// Stricter than a processor in one thing: what it answers with #UD or #GP ends the program with a message, and so does a
// register that the kernel left configured for nobody.
#pragma once
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace emulated {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated intrinsics: %s\n", what);
  std::abort();
}

template <class Element, class Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(Element);
  Element lane[kCount];
  Lanes() = default;
  explicit Lanes(const Vector& v) { std::memcpy(lane, &v, sizeof v); }
  Vector vector() const { return as<Vector>(lane); }
};
using Floats = Lanes<float, __m512>;
using Ints = Lanes<std::int32_t, __m512i>;

// Of the bfloat16 instructions: denormals in and out are zeros of their sign.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float widened(std::uint16_t x) { return flushed(as<float>(std::uint32_t(x) << 16)); }
inline float multiply_add(std::uint16_t a, std::uint16_t b, float sum) {
  return flushed(std::fma(widened(a), widened(b), flushed(sum)));
}
inline std::uint16_t narrowed(float x) {
  const auto bits = as<std::uint32_t>(flushed(x));
  if (std::isnan(x)) return (bits >> 16) | 0x40;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Floats x(a), y(b), z(c);
  for (int i = 0; i < 16; ++i) z.lane[i] = std::fma(x.lane[i], y.lane[i], z.lane[i]);
  return z.vector();
}
inline __m512 maskz_loadu_ps(__mmask16 mask, const void* from) {
  Floats to(__m512{});
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(&to.lane[i], static_cast<const float*>(from) + i, 4);
  return to.vector();
}
inline void mask_storeu_ps(void* to, __mmask16 mask, __m512 from) {
  Floats x(from);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<float*>(to) + i, &x.lane[i], 4);
}

inline __m512i loadu_si512(const void* from) {
  Ints to;
  std::memcpy(to.lane, from, sizeof to.lane);
  return to.vector();
}
inline void storeu_si512(void* to, __m512i from) { std::memcpy(to, &from, sizeof from); }
inline __m512i set1_epi32(std::int32_t x) {
  Ints to;
  for (std::int32_t& lane : to.lane) lane = x;
  return to.vector();
}
inline __m512i set1_epi8(char x) {
  Lanes<char, __m512i> to;
  for (char& lane : to.lane) lane = x;
  return to.vector();
}
inline __m512i sub_epi8(__m512i a, __m512i b) {
  Lanes<std::uint8_t, __m512i> x(a), y(b);
  for (int i = 0; i < 64; ++i) x.lane[i] -= y.lane[i];
  return x.vector();
}
inline __m512i slli_epi32(__m512i a, unsigned count) {
  Ints x(a);
  for (std::int32_t& lane : x.lane) lane = count > 31 ? 0 : std::uint32_t(lane) << count;
  return x.vector();
}
inline __m512i maskz_cvtepu16_epi32(__mmask16 mask, __m256i a) {
  Ints to;
  Lanes<std::uint16_t, __m256i> x(a);
  for (int i = 0; i < 16; ++i) to.lane[i] = mask >> i & 1 ? x.lane[i] : 0;
  return to.vector();
}
inline __m512i cvtepu16_epi32(__m256i a) { return maskz_cvtepu16_epi32(0xFFFF, a); }

// Products of whole numbers that lie in one int32, added to it.
template <class A, class B>
inline __m512i dot(__m512i sum, __m512i a, __m512i b) {
  constexpr int count = 4 / sizeof(A);
  Ints to(sum);
  Lanes<A, __m512i> x(a);
  Lanes<B, __m512i> y(b);
  std::uint32_t total;
  for (int i = 0; i < 16; ++i) {
    total = to.lane[i];
    for (int j = i * count; j < (i + 1) * count; ++j) total += x.lane[j] * y.lane[j];
    to.lane[i] = total;
  }
  return to.vector();
}

// Two products of bfloat16, added to each float: the upper pair first.
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  Floats to(sum);
  Lanes<std::uint16_t, __m512bh> x(a), y(b);
  for (int i = 0; i < 16; ++i)
    for (int j : {2 * i + 1, 2 * i}) to.lane[i] = multiply_add(x.lane[j], y.lane[j], to.lane[i]);
  return to.vector();
}
inline __m256bh cvtneps_pbh(__m512 a) {
  Floats x(a);
  Lanes<std::uint16_t, __m256bh> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = narrowed(x.lane[i]);
  return to.vector();
}
// b in the lower half.
inline __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
  const __m256bh halves[2] = {cvtneps_pbh(b), cvtneps_pbh(a)};
  return as<__m512bh>(halves);
}

struct Tile {
  int rows = 0, bytes = 0;
  std::uint8_t data[16][64] = {};
  template <class T>
  T at(int row, int index) const {
    T value;
    std::memcpy(&value, data[row] + index * sizeof(T), sizeof value);
    return value;
  }
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline Tile& tile(int index) {
  require(configured, "this thread has configured no tiles");
  require(index >= 0 && index < 8 && tiles[index].rows, "the tile is not configured");
  return tiles[index];
}

inline void tile_release() {
  for (Tile& each : tiles) each = Tile();
  configured = false;
}
inline void tile_loadconfig(const void* at) {
  const auto* config = static_cast<const std::uint8_t*>(at);
  tile_release();
  if (config[0] == 0) return;
  require(config[0] == 1 && config[1] == 0, "only palette 1, from row 0");
  for (int i = 2; i < 64; ++i)
    require(config[i] == 0 || (i >= 16 && i < 32) || (i >= 48 && i < 56), "reserved bytes of the configuration are 0");
  for (int i = 0; i < 8; ++i) {
    tiles[i].bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
    tiles[i].rows = config[48 + i];
    require(tiles[i].bytes <= 64 && tiles[i].rows <= 16, "a tile has at most 16 rows of 64 bytes");
    require(!tiles[i].bytes == !tiles[i].rows, "a tile has rows and bytes, or neither");
  }
  configured = true;
}
inline void tile_zero(int index) { std::memset(tile(index).data, 0, sizeof tiles->data); }
inline void tile_loadd(int index, const void* from, std::int64_t stride) {
  tile_zero(index);
  for (int row = 0; row < tile(index).rows; ++row)
    std::memcpy(tile(index).data[row], static_cast<const char*>(from) + row * stride, tile(index).bytes);
}
inline void tile_stored(int index, void* to, std::int64_t stride) {
  for (int row = 0; row < tile(index).rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tile(index).data[row], tile(index).bytes);
}

// The operands of a product: c [m, n] += a [m, k] b [k, n], in words of 4 bytes.
inline Tile& product(int c, int a, int b) {
  require(c != a && c != b && a != b, "a product takes three tiles");
  require(tile(c).rows == tile(a).rows && tile(c).bytes == tile(b).bytes, "the result is [rows of a, columns of b]");
  require(tile(a).bytes == 4 * tile(b).rows, "a row of a is as long as b has rows");
  return tile(c);
}

template <class A, class B>
void tile_dpb(int c, int a, int b) {
  Tile& to = product(c, a, b);
  for (int m = 0; m < to.rows; ++m)
    for (int n = 0; n < to.bytes / 4; ++n) {
      auto sum = to.at<std::uint32_t>(m, n);
      for (int k = 0; k < tile(a).bytes; ++k) sum += tile(a).at<A>(m, k) * tile(b).at<B>(k / 4, 4 * n + k % 4);
      std::memcpy(to.data[m] + 4 * n, &sum, 4);
    }
}
// Even and odd k are summed apart, then together, then onto c.
inline void tile_dpbf16ps(int c, int a, int b) {
  Tile& to = product(c, a, b);
  for (int m = 0; m < to.rows; ++m)
    for (int n = 0; n < to.bytes / 4; ++n) {
      float sums[2] = {};
      for (int k = 0; k < tile(a).bytes / 2; ++k)
        sums[k % 2] = multiply_add(tile(a).at<std::uint16_t>(m, k), tile(b).at<std::uint16_t>(k / 2, 2 * n + k % 2),
                                   sums[k % 2]);
      const float sum = flushed(flushed(to.at<float>(m, n)) + flushed(sums[0] + sums[1]));
      std::memcpy(to.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_sub_epi8 emulated::sub_epi8
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_maskz_cvtepu16_epi32 emulated::maskz_cvtepu16_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_dpbusd_epi32 emulated::dot<std::uint8_t, std::int8_t>
#define _mm512_dpwssd_epi32 emulated::dot<std::int16_t, std::int16_t>
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stream_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _tile_dpbssd emulated::tile_dpb<std::int8_t, std::int8_t>
#define _tile_dpbsud emulated::tile_dpb<std::int8_t, std::uint8_t>
#define _tile_dpbusd emulated::tile_dpb<std::uint8_t, std::int8_t>
#define _tile_dpbuud emulated::tile_dpb<std::uint8_t, std::uint8_t>
