// Attention of many rows: blocks of rows over tiles of 64 keys, both products as register tiles of M rows x 2 vectors
// over keys and values that are repacked, as float32, once for the whole block. Only M rows of scores exist at a time.
#pragma once
#include "attention_common.h"

namespace foveate {
namespace {

// The rows in registers: with the two vectors they meet and a broadcast, the accumulators fill the registers.
template <int W>
constexpr int kTileM = W == 8 ? 6 : 8;

// A block of rows and its running softmax.
template <int W>
struct TileBlock {
  static constexpr int M = kTileM<W>;
  std::int64_t d, padded;  // padded to whole vectors
  float* q;                // [strips, d, M]
  float* out;              // [strips * M, padded]
  float* max;              // [strips, W], of which M are used
  float* sum;              // [strips * M, W], the lanes of each sum
  float* keys;             // [kKeys / 2W, d, 2W]
  float* values;           // [padded / 2W, kKeys, 2W], the last panel perhaps [kKeys, W]
  float* scores;           // [M, kKeys]

  static std::int64_t floats(std::int64_t strips, std::int64_t d) {
    return strips * M * (d + round_up(d, W) + W) + strips * W + kKeys * (d + round_up(d, W) + M) + 7 * 16;
  }
  TileBlock(Scratch& scratch, std::int64_t strips, std::int64_t d) : d(d), padded(round_up(d, W)) {
    q = scratch.take(strips * d * M);
    out = scratch.take(strips * M * padded);
    max = scratch.take(strips * W);
    sum = scratch.take(strips * M * W);
    keys = scratch.take(kKeys * d);
    values = scratch.take(kKeys * padded);
    scores = scratch.take(M * kKeys);
    std::fill_n(out, strips * M * padded, 0.0f);
    std::fill_n(max, strips * W, kLowest);
    std::fill_n(sum, strips * M * W, 0.0f);
  }
};

template <int W>
void pack_queries(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, TileBlock<W>& block) {
  constexpr int M = kTileM<W>;
  const float scale = job.scale * kLog2e;
  for (std::int64_t row = 0; row < round_up(item.n_rows, M); ++row) {
    float* to = block.q + row / M * M * job.d + row % M;
    const float* from = query(job, span, item.kv, item.first_row + std::min(row, item.n_rows - 1));
    for (std::int64_t i = 0; i < job.d; ++i) to[i * M] = from[i] * scale;
  }
}

// n keys, transposed, and zeros up to the end of the panel.
template <int W, class T>
void pack_keys(const T* const* rows, std::int64_t n, TileBlock<W>& block) {
  for (std::int64_t key = 0; key < round_up(n, 2 * W); key += W) {
    float* panel = block.keys + key / (2 * W) * 2 * W * block.d + key % (2 * W);
    for (std::int64_t i = 0; i < block.d; i += W) {
      const std::int64_t width = std::min<std::int64_t>(W, block.d - i);
      vf<W> square[W];
      for (int j = 0; j < W; ++j) {
        if (key + j >= n)
          square[j] = vf<W>{};
        else
          square[j] = width == W ? load<W>(rows[key + j] + i) : load_part<W>(rows[key + j] + i, width);
      }
      transpose<W>(square);
      if (width == W)
        for (int j = 0; j < W; ++j) store<W>(panel + (i + j) * 2 * W, square[j]);
      else
        for (std::int64_t j = 0; j < width; ++j) store<W>(panel + (i + j) * 2 * W, square[j]);
    }
  }
}

template <int W, class T>
void pack_values(const T* const* rows, std::int64_t n, TileBlock<W>& block) {
  for (std::int64_t i = 0; i < block.d; i += W) {
    const std::int64_t panel = i / (2 * W) * 2 * W, stride = std::min<std::int64_t>(2 * W, block.padded - panel);
    const std::int64_t width = std::min<std::int64_t>(W, block.d - i);
    float* to = block.values + panel * kKeys + i - panel;
    for (std::int64_t key = 0; key < n; ++key)
      store<W>(to + key * stride, width == W ? load<W>(rows[key] + i) : load_part<W>(rows[key] + i, width));
  }
}

// scores[M, 2W of kKeys] = q[d, M]^T keys[d, 2W]
template <int W>
FOVEATE_INLINE void score_panel(const float* q, const float* keys, std::int64_t d, float* scores) {
  constexpr int M = kTileM<W>;
  vf<W> sums[M][2] = {};
  for (std::int64_t i = 0; i < d; ++i) {
    const vf<W> low = load<W>(keys + i * 2 * W), high = load<W>(keys + i * 2 * W + W);
#pragma GCC unroll 8
    for (int row = 0; row < M; ++row) {
      const vf<W> value = set1<W>(q[i * M + row]);
      sums[row][0] += value * low;
      sums[row][1] += value * high;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < M; ++row) {
    store<W>(scores + row * kKeys, sums[row][0]);
    store<W>(scores + row * kKeys + W, sums[row][1]);
  }
}

// out[M, N vectors] = out * alpha[M] + weights[M, n of kKeys] values[n, N vectors]
template <int W, int N>
FOVEATE_INLINE void add_panel(const float* weights, const float* values, std::int64_t n, const float* alpha, float* out,
                              std::int64_t stride) {
  constexpr int M = kTileM<W>;
  vf<W> sums[M][N];
#pragma GCC unroll 8
  for (int row = 0; row < M; ++row)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) sums[row][i] = load<W>(out + row * stride + i * W) * alpha[row];
  for (std::int64_t key = 0; key < n; ++key) {
    vf<W> value[N];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) value[i] = load<W>(values + (key * N + i) * W);
#pragma GCC unroll 8
    for (int row = 0; row < M; ++row) {
      const vf<W> weight = set1<W>(weights[row * kKeys + key]);
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) sums[row][i] += weight * value[i];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < M; ++row)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) store<W>(out + row * stride + i * W, sums[row][i]);
}

// Scores of keys [first_key, + columns) that a row of the strip must not see become -inf.
template <int W>
void hide(const AttentionJob& job, const AttentionSpan& span, std::int64_t first_row, std::int64_t end_row,
          std::int64_t first_key, std::int64_t n, std::int64_t columns, float* scores) {
  for (int i = 0; i < kTileM<W>; ++i) {
    const std::int64_t row = std::min(first_row + i, end_row - 1);
    float* mine = scores + i * kKeys;
    if (span.tree)
      for (std::int64_t j = std::max<std::int64_t>(0, span.length - span.m - first_key); j < n; ++j)
        if (!sees(job, span, row, first_key + j)) mine[j] = -INFINITY;
    const std::int64_t end = std::clamp<std::int64_t>(limit(job, span, row) - first_key, 0, n);
    for (std::int64_t j = end; j < columns; ++j) mine[j] = -INFINITY;
  }
}

// Turns a strip's scores into weights relative to its new maxima; alpha [W]: by how much the old sums shrink.
template <int W>
FOVEATE_INLINE void weigh(float* scores, std::int64_t columns, float* max, float* sum, float* alpha) {
  constexpr int M = kTileM<W>;
  vf<W> best[W];
  for (int row = 0; row < W; ++row) best[row] = set1<W>(kLowest);
#pragma GCC unroll 8
  for (int row = 0; row < M; ++row)
    for (std::int64_t i = 0; i < columns; i += W) best[row] = Max{}(best[row], load<W>(scores + row * kKeys + i));
  const vf<W> old = load<W>(max), now = Max{}(old, reduce<W>(best, Max{}));
  store<W>(max, now);
  store<W>(alpha, exp2<W>(old - now));
  for (int row = 0; row < M; ++row) {
    const vf<W> top = set1<W>(max[row]);
    vf<W> total = load<W>(sum + row * W) * alpha[row];
    for (std::int64_t i = 0; i < columns; i += W) {
      const vf<W> weight = exp2<W>(load<W>(scores + row * kKeys + i) - top);
      store<W>(scores + row * kKeys + i, weight);
      total += weight;
    }
    store<W>(sum + row * W, total);
  }
}

// One strip of M rows, from row `first_row` of the span on, against the n packed keys from first_key on.
template <int W>
void attend_strip(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, std::int64_t strip,
                  std::int64_t first_key, std::int64_t n, TileBlock<W>& block) {
  constexpr int M = kTileM<W>;
  const std::int64_t first_row = item.first_row + strip * M, end_row = item.first_row + item.n_rows;
  const std::int64_t last_row = std::min(first_row + M, end_row) - 1;
  const std::int64_t seen = std::min(n, limit(job, span, last_row) - first_key);
  if (seen <= 0) return;
  const std::int64_t columns = round_up(seen, 2 * W);
  for (std::int64_t i = 0; i < columns; i += 2 * W)
    score_panel<W>(block.q + strip * M * block.d, block.keys + i * block.d, block.d, block.scores + i);
  const bool new_keys = (span.causal || span.tree) && first_key + n > span.length - span.m;
  if (columns > seen || new_keys) hide<W>(job, span, first_row, end_row, first_key, n, columns, block.scores);
  alignas(64) float alpha[W];
  weigh<W>(block.scores, columns, block.max + strip * W, block.sum + strip * M * W, alpha);
  float* out = block.out + strip * M * block.padded;
  std::int64_t i = 0;
  for (; i + 2 * W <= block.padded; i += 2 * W)
    add_panel<W, 2>(block.scores, block.values + i * kKeys, seen, alpha, out + i, block.padded);
  if (i < block.padded) add_panel<W, 1>(block.scores, block.values + i * kKeys, seen, alpha, out + i, block.padded);
}

template <int W, class T>
void attend_tiles(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, float* partials) {
  constexpr int M = kTileM<W>;
  const std::int64_t strips = round_up(item.n_rows, M) / M;
  Scratch scratch(TileBlock<W>::floats(strips, job.d));
  TileBlock<W> block(scratch, strips, job.d);
  pack_queries<W>(job, span, item, block);
  const T *keys[kKeys], *values[kKeys];
  std::int64_t first = item.first_key, n = std::min(kKeys, item.end_key - first);
  locate<T>(job, span, item.kv, first, n, keys, values);
  while (n > 0) {
    pack_keys<W>(keys, n, block);
    pack_values<W>(values, n, block);
    const std::int64_t packed = n, packed_first = first;
    n = std::min(kKeys, item.end_key - (first += n));
    locate<T>(job, span, item.kv, first, n, keys, values);
    for (std::int64_t i = 0; i < n; ++i) prefetch(keys[i], job.d), prefetch(values[i], job.d);  // for the next round
    for (std::int64_t strip = 0; strip < strips; ++strip)
      attend_strip<W>(job, span, item, strip, packed_first, packed, block);
  }
  for (std::int64_t row = 0; row < item.n_rows; ++row)
    finish_part<W>(job, span, item, 0, row, block.out + row * block.padded, sum<W>(load<W>(block.sum + row * W)),
                   block.max[row / M * W + row % M], partials);
}

template <int W>
void tile(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, float* partials) {
  if (job.stored == Stored::kFloat32) return attend_tiles<W, float>(job, span, item, partials);
  attend_tiles<W, bf16>(job, span, item, partials);
}

}  // namespace
}  // namespace foveate
