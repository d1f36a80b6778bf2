// float32 and bfloat16 weights, multiplied in float32. For W lanes.
#pragma once
#include "linear_drive.h"

namespace foveate {
namespace {

template <int W>
FOVEATE_INLINE vf<W> multiply_add(vf<W> a, vf<W> b, vf<W> c) {
  if constexpr (W == 8)
    return (vf<W>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (vf<W>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// kSteps of k of 16 columns, 64 bytes: step s of the W columns from `column` on.
template <int W, class T>
FOVEATE_INLINE vf<W> widened(const char* weights, int column, int s) {
  if constexpr (sizeof(T) == 4) return load<W>(reinterpret_cast<const float*>(weights) + column);
  vi<W> pairs;
  std::memcpy(&pairs, weights + column * 4, sizeof pairs);
  return s ? (vf<W>)(pairs & int(0xFFFF0000)) : (vf<W>)(pairs << 16);
}

template <int W, class T, int R, int P>
void float_tile(const Visit& visit) {
  constexpr int V = kPanel / W, S = 4 / sizeof(T);
  const std::int64_t panel_bytes = visit.panel_bytes, ahead_panel = visit.ahead_panel_bytes, steps = visit.k / S;
  const float* x = reinterpret_cast<const float*>(visit.x) + visit.k0 * R;
  const char* w = visit.weights;
  const char* ahead = visit.ahead;
  vf<W> acc[R][P][V];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < V; ++j)
        acc[r][p][j] = visit.k0 ? load<W>(visit.sums + p * visit.panel_sums + r * kPanel + j * W) : vf<W>{};
  for (std::int64_t i = 0; i < steps; ++i, w += 64, x += S * R, ahead += visit.ahead_step) {
    for (int p = 0; p < P; ++p) _mm_prefetch(ahead + p * ahead_panel, _MM_HINT_T0);
    for (int s = 0; s < S; ++s) {
      vf<W> weights[P][V];
      for (int p = 0; p < P; ++p)
        for (int j = 0; j < V; ++j) weights[p][j] = widened<W, T>(w + p * panel_bytes, j * W, s);
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
          for (int j = 0; j < V; ++j)
            acc[r][p][j] = multiply_add<W>(set1<W>(x[s * R + r]), weights[p][j], acc[r][p][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < V; ++j) store<W>(visit.sums + p * visit.panel_sums + r * kPanel + j * W, acc[r][p][j]);
}

// T: what a weight is stored as. R, P: rows and panels of the largest tile.
template <int W, class T, int R, int P>
struct FloatForm : Tiles<FloatForm<W, T, R, P>, R, P> {
  static constexpr int kGroup = 4 / sizeof(T), kStep = kGroup, kBits = 8 * sizeof(T);
  static constexpr std::int64_t kChunk = 16384 * 8 / (kPanel * kBits);

  static std::int64_t row_bytes(std::int64_t k) { return k * sizeof(float); }

  // One whole row is packed already.
  static const char* in_place(const Linear& p, std::int64_t k) {
    return p.m == 1 && p.k == k ? reinterpret_cast<const char*>(p.x) : nullptr;
  }

  // [k, rows]
  static void pack(const Linear& p, std::int64_t row, std::int64_t rows, std::int64_t k, char* to) {
    auto* out = reinterpret_cast<float*>(to);
    const float* x = p.x + row * p.x_stride;
    for (std::int64_t i = 0; i < p.k; ++i)
      for (std::int64_t r = 0; r < rows; ++r) out[i * rows + r] = x[r * p.x_stride + i];
    std::memset(out + p.k * rows, 0, (k - p.k) * rows * sizeof(float));
  }

  template <int Rows, int Panels>
  static void run(const Visit& visit) {
    float_tile<W, T, Rows, Panels>(visit);
  }
};

// bfloat16 weights for many rows: a chunk of a panel is widened once, for all tiles that pass over it.
template <int W, int R>
struct WidenedForm : FloatForm<W, float, R, 1> {
  static constexpr int kGroup = 2, kBits = 16;

  static void prepare(Visit& visit, std::int64_t) {
    auto* to = reinterpret_cast<float*>(widened_room.get(visit.k * kPanel * sizeof(float)));
    for (std::int64_t i = 0; i < visit.k; ++i)
      for (int j = 0; j < kPanel; j += W)
        store<W>(to + i * kPanel + j, widened<W, bf16>(visit.weights + i / 2 * 64, j, i % 2));
    visit.weights = reinterpret_cast<const char*>(to);
  }
};

}  // namespace
}  // namespace foveate
