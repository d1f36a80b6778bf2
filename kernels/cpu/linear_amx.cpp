// Tiles of 16 rows by 16 columns, two by two: bfloat16 weights by inputs rounded to bfloat16, int8 and int4 weights by
// int8 inputs. A tile of weights is 1 KB of a panel as it lies in memory: 32 k of bfloat16 or 64 of int8.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "linear.h"
#include "runtime.h"

#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512")
#include "simd.h"

#include "linear_int.h"

namespace foveate {
namespace {

constexpr int kTile = 16;  // rows of a tile register
constexpr int kTileBytes = 1024;

// Stores to what `p` points at happen before what follows: g++ 12 does not know that tile instructions read memory.
FOVEATE_INLINE void ordered(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// Tile registers: 0 to 3 hold sums [row half][panel], 4 and 5 rows of x, 6 and 7 weights. With `rows` rows of x, at
// most 32, the second half has those over 16.
void configure(int rows) {
  alignas(64) std::uint8_t config[64] = {1};
  auto* column_bytes = reinterpret_cast<std::uint16_t*>(config + 16);
  const int first = std::min(rows, kTile), second = std::max(rows - kTile, 1);
  const int lines[8] = {first, first, second, second, first, second, kTile, kTile};
  for (int tile = 0; tile < 8; ++tile) {
    column_bytes[tile] = 64;
    config[48 + tile] = lines[tile];
  }
  ordered(config);
  _tile_loadconfig(config);
}

thread_local int configured = 0;  // for how many rows; 0: not at all

// Sums over `steps` tiles of k into tile registers 0 to 3. x: rows of `x_stride` bytes.
template <bool Int, bool Two, int P>
FOVEATE_INLINE void multiply(const char* x, std::int64_t x_stride, const char* w, const Visit& visit,
                             std::int64_t steps, const char* ahead) {
  const std::int64_t panel_bytes = visit.panel_bytes;
  ordered(x);
  for (std::int64_t i = 0; i < steps; ++i, x += 64, w += kTileBytes) {
    for (int p = 0; p < P; ++p)
      for (int line = 0; line < 16; ++line)
        _mm_prefetch(ahead + p * visit.ahead_panel_bytes + line * visit.ahead_step, _MM_HINT_T0);
    ahead += 16 * visit.ahead_step;
    _tile_loadd(4, x, x_stride);
    if constexpr (Two) _tile_loadd(5, x + kTile * x_stride, x_stride);
    _tile_loadd(6, w, 64);
    if constexpr (P == 2) _tile_loadd(7, w + panel_bytes, 64);
    if constexpr (Int) {
      _tile_dpbssd(0, 4, 6);
      if constexpr (P == 2) _tile_dpbssd(1, 4, 7);
      if constexpr (Two) _tile_dpbssd(2, 5, 6);
      if constexpr (Two && P == 2) _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (P == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (Two) _tile_dpbf16ps(2, 5, 6);
      if constexpr (Two && P == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <bool Two, int P>
FOVEATE_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (P == 2) _tile_zero(1);
  if constexpr (Two) _tile_zero(2);
  if constexpr (Two && P == 2) _tile_zero(3);
}

// The sums from or to memory: rows of 64 bytes, panels `panel_step` bytes apart.
template <bool Two, int P>
FOVEATE_INLINE void load_sums(const char* at, std::int64_t panel_step) {
  ordered(at);
  _tile_loadd(0, at, 64);
  if constexpr (P == 2) _tile_loadd(1, at + panel_step, 64);
  if constexpr (Two) _tile_loadd(2, at + kTileBytes, 64);
  if constexpr (Two && P == 2) _tile_loadd(3, at + panel_step + kTileBytes, 64);
}
template <bool Two, int P>
FOVEATE_INLINE void store_sums(char* at, std::int64_t panel_step) {
  _tile_stored(0, at, 64);
  if constexpr (P == 2) _tile_stored(1, at + panel_step, 64);
  if constexpr (Two) _tile_stored(2, at + kTileBytes, 64);
  if constexpr (Two && P == 2) _tile_stored(3, at + panel_step + kTileBytes, 64);
  ordered(at);
}

// What both forms share: tiles of up to 32 rows, of which only more than 16 need the second half.
template <class Form>
struct AmxTiles : Hooks {
  static constexpr int kRows = 2 * kTile, kPanels = 2;

  static Tile tile(std::int64_t rows, std::int64_t panels) {
    if (configured != rows) configure(configured = rows);
    if (panels == 1) return rows > kTile ? Form::template run<true, 1> : Form::template run<false, 1>;
    return rows > kTile ? Form::template run<true, 2> : Form::template run<false, 2>;
  }

  // Gives the registers back after a region: a thread that holds tiles pays for them at every context switch.
  static void release() {
    if (configured) _tile_release();
    configured = 0;
  }
};

struct AmxBf16Form : AmxTiles<AmxBf16Form> {
  static constexpr int kGroup = 32, kStep = 2, kBits = 16;
  static constexpr std::int64_t kChunk = 512;

  static std::int64_t row_bytes(std::int64_t k) { return k * 2; }

  // [rows, k]
  static void pack(const Linear& p, std::int64_t row, std::int64_t rows, std::int64_t k, char* to) {
    for (std::int64_t r = 0; r < rows; ++r) {
      auto* out = reinterpret_cast<bf16*>(to) + r * k;
      const float* x = p.x + (row + r) * p.x_stride;
      std::int64_t i = 0;
      for (; i + 16 <= p.k; i += 16) store<16>(out + i, load<16>(x + i));
      for (; i < k; ++i) set(out[i], i < p.k ? x[i] : 0.0f);
    }
  }

  template <bool Two, int P>
  static void run(const Visit& visit) {
    auto* sums = reinterpret_cast<char*>(visit.sums);
    const std::int64_t panel_step = visit.panel_sums * 4;
    visit.k0 ? load_sums<Two, P>(sums, panel_step) : zero_sums<Two, P>();
    multiply<false, Two, P>(visit.x + visit.k0 * 2, visit.all_k * 2, visit.weights, visit, visit.k / 32,
                            visit.ahead);
    store_sums<Two, P>(sums, panel_step);
  }
};

// int8 weights as they lie; int4 weights become int8 chunk by chunk.
template <int Bits>
struct AmxIntForm : AmxTiles<AmxIntForm<Bits>> {
  static constexpr int kGroup = kGroupOf<Bits>, kStep = 4, kBits = Bits;
  static constexpr std::int64_t kChunk = 1024;

  static std::int64_t row_bytes(std::int64_t k) { return k + k / kGroup * 4; }

  // int8 [rows, k], then scales float32 [k / group, rows].
  static void pack(const Linear& p, std::int64_t row, std::int64_t rows, std::int64_t k, char* to) {
    auto* scales = reinterpret_cast<float*>(to + k * rows);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t g = 0; g < k / kGroup; ++g) {
        std::int32_t total;
        float room[kGroup];
        const float* x = group_of(p, row + r, g, room);
        auto* out = reinterpret_cast<std::int8_t*>(to + r * k + g * kGroup);
        scales[g * rows + r] = quantized<16>(x, kGroup, out, &total);
      }
  }

  static void prepare(Visit& visit, std::int64_t panels) {
    if (Bits == 8) return;
    const std::int64_t bytes = visit.k * kPanel;
    char* to = widened_room.get(bytes * AmxIntForm::kPanels);
    for (std::int64_t p = 0; p < panels; ++p)
      for (std::int64_t i = 0; i < bytes; i += 128) {
        const __m512i offset = _mm512_set1_epi8(8);
        vi<16> pairs;
        std::memcpy(&pairs, visit.weights + p * visit.panel_bytes + i / 2, sizeof pairs);
        _mm512_storeu_si512(to + p * bytes + i, _mm512_sub_epi8((__m512i)(pairs & 0x0F0F0F0F), offset));
        _mm512_storeu_si512(to + p * bytes + i + 64, _mm512_sub_epi8((__m512i)(pairs >> 4 & 0x0F0F0F0F), offset));
      }
    visit.weights = to;
    visit.panel_bytes = bytes;
  }

  template <bool Two, int P>
  static void run(const Visit& visit) {
    alignas(64) std::int32_t totals[P][Two ? 32 : 16][kPanel];
    const std::int64_t rows = visit.rows, group0 = visit.k0 / kGroup;
    const char *x = visit.x + visit.k0, *ahead = visit.ahead;
    const auto* scales = reinterpret_cast<const float*>(visit.x + visit.all_k * rows) + group0 * rows;
    for (std::int64_t g = 0; g < visit.k / kGroup; ++g) {
      zero_sums<Two, P>();
      multiply<true, Two, P>(x + g * kGroup, visit.all_k, visit.weights + g * kGroup * kPanel, visit, kGroup / 64,
                             ahead + g * kGroup / 4 * visit.ahead_step);
      store_sums<Two, P>(reinterpret_cast<char*>(totals), sizeof totals[0]);
      for (int p = 0; p < P; ++p) {
        const vf<16> weight_scales = load<16>(visit.scales + p * visit.panel_scales + g * kPanel);
        float* sums = visit.sums + p * visit.panel_sums;
        for (std::int64_t r = 0; r < rows; ++r, sums += kPanel) {
          vi<16> total;
          std::memcpy(&total, totals[p][r], sizeof total);
          const vf<16> before = group0 + g ? load<16>(sums) : vf<16>{};
          store<16>(sums, multiply_add<16>(__builtin_convertvector(total, vf<16>), weight_scales * scales[g * rows + r], before));
        }
      }
    }
  }
};

}  // namespace

void linear_amx(const Linear& p) {
  switch (p.form) {
    case Form::kBfloat16: return Drive<16, AmxBf16Form>(p).run();
    case Form::kInt8: return Drive<16, AmxIntForm<8>>(p).run();
    case Form::kInt4: return Drive<16, AmxIntForm<4>>(p).run();
    case Form::kInt16:
    case Form::kFloat32: return linear_avx512(p);
  }
}

}  // namespace foveate
