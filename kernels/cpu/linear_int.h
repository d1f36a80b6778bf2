// int16, int8 and int4 weights by inputs of 16 bits for the first and 8 for the others: each row of x is quantized here,
// group by group, sums within a group are exact in int32, and float32 carries them from group to group. For W lanes.
#pragma once
#include "linear_float.h"

namespace foveate {
namespace {

template <int Bits>
constexpr int kGroupOf = Bits == 4 ? 64 : 128;  // values with one scale

template <int Bits>
constexpr int kInputBytes = Bits == 16 ? 2 : 1;

// What is added to a weight where it is multiplied as an unsigned byte; sums are corrected by it times those of x.
template <int W, int Bits>
constexpr int kOffset = Bits == 4 ? 8 : Bits == 8 && W == 16 ? 128 : 0;

// Sums of 4 products of bytes each; `w` holds signed weights for W = 8 (its absolute value takes the first, unsigned
// place of the instruction, its sign moves to x: 2 * 127 * 127 fits 16 bits) and unsigned ones for W = 16.
template <int W>
FOVEATE_INLINE vi<W> dot_bytes(vi<W> acc, vi<W> w, vi<W> x) {
  if constexpr (W == 8) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
    return acc + (vi<W>)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  } else {
    return (vi<W>)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
  }
}

// Sums of 2 products of int16 each.
template <int W>
FOVEATE_INLINE vi<W> dot_pairs(vi<W> acc, vi<W> w, vi<W> x) {
  if constexpr (W == 8) {
    acc += (vi<W>)_mm256_madd_epi16((__m256i)w, (__m256i)x);
    asm("" : "+x"(acc));  // in this order: g++ would make all products of a step before it adds one, and spill half
    return acc;
  } else {
    return (vi<W>)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
  }
}

// Adds one group of 128 products of int16 or int8 to acc.
template <int W, int Bits, int R, int P>
FOVEATE_INLINE void add_group(const char* w, const std::int32_t* x, const Visit& visit, const char* ahead,
                              vi<W> (&acc)[R][P][kPanel / W]) {
#pragma GCC unroll 1
  for (int step = 0; step < Bits * 4; ++step, w += 64, x += R, ahead += visit.ahead_step) {
    vi<W> weights[P][kPanel / W];
    for (int p = 0; p < P; ++p) {
      _mm_prefetch(ahead + p * visit.ahead_panel_bytes, _MM_HINT_T0);
      for (int j = 0; j < kPanel / W; ++j) {
        std::memcpy(&weights[p][j], w + p * visit.panel_bytes + j * W * 4, W * 4);
        if (kOffset<W, Bits> == 128) weights[p][j] ^= int(0x80808080);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        for (int j = 0; j < kPanel / W; ++j)
          if constexpr (Bits == 16)
            acc[r][p][j] = dot_pairs<W>(acc[r][p][j], weights[p][j], x[r] + vi<W>{});
          else
            acc[r][p][j] = dot_bytes<W>(acc[r][p][j], weights[p][j], x[r] + vi<W>{});
  }
}

// Adds one group of 64 products of int4 to acc.
template <int W, int R, int P>
FOVEATE_INLINE void add_int4_group(const char* w, const std::int32_t* x, const Visit& visit, const char* ahead,
                                   vi<W> (&acc)[R][P][kPanel / W]) {
  for (int half = 0; half < 2; ++half) {
    vi<W> pairs[R][P][kPanel / W] = {};  // W = 8: of 16 bits, room for 8 sums of two products: 8 * 2 * 15 * 127
#pragma GCC unroll 1  // unrolled, the sums would be reordered and run out of registers
    for (int step = 0; step < 4; ++step, w += 64, x += 2 * R, ahead += visit.ahead_step) {
      vi<W> weights[P][kPanel / W];
      for (int p = 0; p < P; ++p) {
        _mm_prefetch(ahead + p * visit.ahead_panel_bytes, _MM_HINT_T0);
        for (int j = 0; j < kPanel / W; ++j)
          std::memcpy(&weights[p][j], w + p * visit.panel_bytes + j * W * 4, W * 4);
      }
      for (int s = 0; s < 2; ++s) {
        vi<W> nibbles[P][kPanel / W];
        for (int p = 0; p < P; ++p)
          for (int j = 0; j < kPanel / W; ++j)
            nibbles[p][j] = (s ? weights[p][j] >> 4 : weights[p][j]) & 0x0F0F0F0F;
        for (int r = 0; r < R; ++r)
          for (int p = 0; p < P; ++p)
            for (int j = 0; j < kPanel / W; ++j) {
              const vi<W> inputs = x[s * R + r] + vi<W>{};
              if constexpr (W == 8)
                pairs[r][p][j] = (vi<W>)_mm256_add_epi16(
                    (__m256i)pairs[r][p][j], _mm256_maddubs_epi16((__m256i)nibbles[p][j], (__m256i)inputs));
              else
                acc[r][p][j] = dot_bytes<W>(acc[r][p][j], nibbles[p][j], inputs);
            }
      }
    }
    if constexpr (W == 8)
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
          for (int j = 0; j < kPanel / W; ++j)
            acc[r][p][j] += (vi<W>)_mm256_madd_epi16((__m256i)pairs[r][p][j], _mm256_set1_epi16(1));
  }
}

template <int W, int Bits, int R, int P>
void int_tile(const Visit& visit) {
  constexpr int V = kPanel / W, Group = kGroupOf<Bits>, GroupBytes = Group * kPanel * Bits / 8;
  constexpr int PerWord = 4 / kInputBytes<Bits>;
  const std::int64_t groups = visit.all_k / Group, group0 = visit.k0 / Group;
  const auto* words = reinterpret_cast<const std::int32_t*>(visit.x);
  const auto* x = words + visit.k0 / PerWord * R;
  const auto* after = words + visit.all_k / PerWord * R;
  const auto* scales = reinterpret_cast<const float*>(after) + group0 * R;
  const auto* x_sums = after + (groups + group0) * R;
  const char* w = visit.weights;
  const char* ahead = visit.ahead;
  for (std::int64_t g = 0; g < visit.k / Group; ++g, w += GroupBytes, x += Group / PerWord * R) {
    for (int p = 0; p < P; ++p)
      _mm_prefetch(visit.scales + p * visit.panel_scales + (g + 4) * kPanel, _MM_HINT_T0);
    vi<W> acc[R][P][V];
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        for (int j = 0; j < V; ++j) acc[r][p][j] = vi<W>{} - kOffset<W, Bits> * x_sums[g * R + r];
    if constexpr (Bits == 4)
      add_int4_group<W>(w, x, visit, ahead, acc);
    else
      add_group<W, Bits>(w, x, visit, ahead, acc);
    ahead += GroupBytes / 64 * visit.ahead_step;
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < V; ++j) {
        const vf<W> weight_scales = load<W>(visit.scales + p * visit.panel_scales + g * kPanel + j * W);
        for (int r = 0; r < R; ++r) {
          float* sums = visit.sums + p * visit.panel_sums + r * kPanel + j * W;
          const vf<W> before = group0 + g ? load<W>(sums) : vf<W>{};
          const vf<W> total = __builtin_convertvector(acc[r][p][j], vf<W>);
          store<W>(sums, multiply_add<W>(total, weight_scales * scales[g * R + r], before));
        }
      }
  }
}

// What the absolute values of a group of 16-bit inputs may add up to: (2^31 - 1) / 8191 is 262,176, and rounding adds 64.
constexpr float kMostOfGroup = 262000;

// Quantizes `group` values at x to integers of type T at `to`; returns their scale, a NaN where one of them is none or
// infinite. 8 bits: within -127 and 127. 16 bits: as fine as int32 holds the sum of their products with weights within
// -8191 and 8191.
template <int W, class T>
float quantized(const float* x, int group, T* to, std::int32_t* total) {
  typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
  vf<W> most = {}, all = {}, poison = {};
  for (int i = 0; i < group; i += W) {
    const vf<W> v = load<W>(x + i), size = max<W>(v, -v);
    most = max<W>(most, size);
    all += size;
    poison += v * 0.0f;
  }
  float top = 0;
  for (int i = 0; i < W; ++i) top = std::max(top, most[i]);
  const float step = sizeof(T) == 1 ? top / 127 : std::max(top / 32767, sum<W>(all) / kMostOfGroup);
  const float inverse = top == 0 ? 0 : sizeof(T) == 1 ? 127 / top : 1 / step;
  const vf<W> magic = set1<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  vi<W> totals = {};
  for (int i = 0; i < group; i += W) {
    const vi<W> v = (vi<W>)multiply_add<W>(load<W>(x + i), set1<W>(inverse), magic) - (vi<W>)magic;
    totals += v;
    const auto narrow = __builtin_convertvector(v, Narrow);
    std::memcpy(to + i, &narrow, sizeof narrow);
  }
  *total = 0;
  for (int i = 0; i < W; ++i) *total += totals[i];
  return step + sum<W>(poison);
}

// Group g of a row of x: there, or, where the row ends inside, in `room` with zeros after it.
template <int Group>
const float* group_of(const Linear& p, std::int64_t row, std::int64_t g, float (&room)[Group]) {
  const float* x = p.x + row * p.x_stride + g * Group;
  const std::int64_t rest = p.k - g * Group;
  if (rest >= Group) return x;
  std::memset(room, 0, sizeof room);
  return static_cast<float*>(std::memcpy(room, x, rest * sizeof(float)));
}

// Bits: of a weight. R, P: rows and panels of the largest tile.
template <int W, int Bits, int R, int P>
struct IntForm : Tiles<IntForm<W, Bits, R, P>, R, P> {
  static constexpr int kGroup = kGroupOf<Bits>, kBits = Bits, kStep = 32 / Bits;
  static constexpr std::int64_t kChunk = 16384 * 8 / (kPanel * kBits);

  static std::int64_t row_bytes(std::int64_t k) { return k * kInputBytes<Bits> + k / kGroup * 8; }

  // Integers [k / n, rows, n], n to a word, then scales float32 [k / group, rows] and sums int32 [k / group, rows].
  static void pack(const Linear& p, std::int64_t row, std::int64_t rows, std::int64_t k, char* to) {
    using Input = std::conditional_t<Bits == 16, std::int16_t, std::int8_t>;
    constexpr int Words = kGroup * sizeof(Input) / 4;
    auto* words = reinterpret_cast<std::int32_t*>(to);
    auto* totals = words + k / kGroup * (Words + 1) * rows;
    auto* scales = reinterpret_cast<float*>(words + k / kGroup * Words * rows);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t g = 0; g < k / kGroup; ++g) {
        float room[kGroup];
        std::int32_t group[Words];
        const float* x = group_of(p, row + r, g, room);
        scales[g * rows + r] = quantized<W>(x, kGroup, reinterpret_cast<Input*>(group), totals + g * rows + r);
        for (int i = 0; i < Words; ++i) words[(g * Words + i) * rows + r] = group[i];
      }
  }

  template <int Rows, int Panels>
  static void run(const Visit& visit) {
    int_tile<W, Bits, Rows, Panels>(visit);
  }
};

}  // namespace
}  // namespace foveate
