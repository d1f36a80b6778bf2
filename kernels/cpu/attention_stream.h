// Attention of a few rows: keys and values are read once, as they lie. Up to 8 rows meet a key while it is in a
// register. The scores of a tile lie as [key, P] with P the rows rounded up to a power of two, so that a vector holds
// W / P keys: maxima, weights and sums are taken lane by lane.
#pragma once
#include "attention_common.h"

namespace foveate {
namespace {

constexpr int kGroupRows = 8;
constexpr std::int64_t kAhead = 16;  // keys asked for before they are scored: the time in which memory answers

// Rows of one key head that are taken together, and their running softmax.
struct StreamGroup {
  std::int64_t first_row;  // of the span
  int n_rows;
  const float* q;  // [n_rows, padded]
  float* out;      // [n_rows, padded]
  float* max;      // [W] lane i: of row i % P
  float* sum;      // [W] lanes to be added up over i % P
};

// The keys of one tile.
template <class T>
struct StreamTile {
  std::int64_t first_key, n;
  const T *keys[kKeys + kAhead], *values[kKeys + kAhead];  // past n, those of the next tile, or the last one again
};

template <int R>
constexpr int kLanesOf = R <= 1 ? 1 : R <= 2 ? 2 : R <= 4 ? 4 : 8;

// Adds to the sums what column i on gives: a vector, or with Part the `width` values left.
template <int W, class T, int R, int K, bool Part>
FOVEATE_INLINE void add_scores(const float* q, std::int64_t padded, const T* const (&rows)[K], std::int64_t i,
                               std::int64_t width, vf<W> (&sums)[K][R]) {
  vf<W> value[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) value[k] = Part ? load_part<W>(rows[k] + i, width) : load<W>(rows[k] + i);
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) {
    const vf<W> mine = load<W>(q + row * padded + i);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) sums[k][row] += mine * value[k];
  }
}

// scores[n, P] of R rows.
template <int W, class T, int R>
FOVEATE_INLINE void score_keys(const float* q, std::int64_t d, std::int64_t padded, const StreamTile<T>& tile,
                               std::int64_t head, float* scores) {
  constexpr int P = kLanesOf<R>, per_vector = W / P, vectors = R * per_vector * 2 <= 2 * W - 2 ? 2 : 1;
  constexpr int K = per_vector * vectors;  // keys at a time
  for (std::int64_t key = 0; key < tile.n; key += K) {
    const T* rows[K];
    for (int k = 0; k < K; ++k) {
      rows[k] = tile.keys[key + k] + head;
      prefetch(tile.keys[std::min(key + k + kAhead, kKeys + kAhead - 1)] + head, d);
      prefetch(tile.values[key + k] + head, d);
    }
    vf<W> sums[K][R] = {};
    std::int64_t i = 0;
    for (; i + W <= d; i += W) add_scores<W, T, R, K, false>(q, padded, rows, i, W, sums);
    if (i < d) add_scores<W, T, R, K, true>(q, padded, rows, i, d - i, sums);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      vf<W> lanes[W] = {};
#pragma GCC unroll 16
      for (int k = 0; k < per_vector; ++k)
#pragma GCC unroll 8
        for (int row = 0; row < R; ++row) lanes[k * P + row] = sums[v * per_vector + k][row];
      store<W>(scores + (key + v * per_vector) * P, reduce<W>(lanes, Add{}));
    }
  }
}

// out[R, N vectors] = out * alpha[R] + weights[n, P]^T values, from value `at` of a token on, or with width < W only so
// many of one vector.
template <int W, class T, int R, int P, int N>
FOVEATE_INLINE void add_columns(const float* weights, const StreamTile<T>& tile, std::int64_t at, std::int64_t width,
                                const float* alpha, float* out, std::int64_t padded) {
  vf<W> sums[R][N];
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[row][i] = load<W>(out + row * padded + i * W) * alpha[row];
  for (std::int64_t key = 0; key < tile.n; ++key) {
    vf<W> value[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      value[i] = width < W ? load_part<W>(tile.values[key] + at, width) : load<W>(tile.values[key] + at + i * W);
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row) {
      const vf<W> weight = set1<W>(weights[key * P + row]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[row][i] += weight * value[i];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store<W>(out + row * padded + i * W, sums[row][i]);
}

// All columns from i on: N vectors at a time, then what is left.
template <int W, class T, int R, int P, int N>
FOVEATE_INLINE void add_values(const float* weights, const StreamTile<T>& tile, std::int64_t head, std::int64_t i,
                               std::int64_t d, const float* alpha, float* out, std::int64_t padded) {
  for (; i + N * W <= d; i += N * W)
    add_columns<W, T, R, P, N>(weights, tile, head + i, W, alpha, out + i, padded);
  if constexpr (N > 1)
    add_values<W, T, R, P, N - 1>(weights, tile, head, i, d, alpha, out, padded);
  else if (i < d)
    add_columns<W, T, R, P, 1>(weights, tile, head + i, d - i, alpha, out + i, padded);
}

// Turns scores [n, P] into weights; alpha [W]: by how much the old sums shrink.
template <int W, int P>
FOVEATE_INLINE void weigh_keys(float* scores, std::int64_t n, const StreamGroup& group, float* alpha) {
  const vf<W> old = load<W>(group.max);
  vf<W> now = old;
  for (std::int64_t i = 0; i < n * P; i += W) now = Max{}(now, load<W>(scores + i));
  now = fold<W, P>(now, Max{});
  const vf<W> shrink = exp2<W>(old - now);
  vf<W> total = load<W>(group.sum) * shrink;
  for (std::int64_t i = 0; i < n * P; i += W) {
    const vf<W> weight = exp2<W>(load<W>(scores + i) - now);
    store<W>(scores + i, weight);
    total += weight;
  }
  store<W>(group.max, now);
  store<W>(group.sum, total);
  store<W>(alpha, shrink);
}

// Vectors of values that meet R rows at a time. AVX2 has 16 registers: a sum that lies in memory instead waits for its
// own store with every key.
template <int W, int R>
constexpr int kColumns = R == 1 ? 8 : W == 8 ? (R == 2 ? 4 : R == 3 ? 3 : 2) : R <= 3 ? 4 : 3;

template <int W, class T, int R>
void attend_group(const AttentionJob& job, const AttentionSpan& span, const StreamTile<T>& tile, std::int64_t head,
                  const StreamGroup& group, std::int64_t padded, float* scores) {
  constexpr int P = kLanesOf<R>;
  score_keys<W, T, R>(group.q, job.d, padded, tile, head, scores);
  for (std::int64_t i = tile.n * P; i < round_up(tile.n * P, W); ++i) scores[i] = -INFINITY;
  if (span.m > 1 && tile.first_key + tile.n > span.length - span.m)
    for (std::int64_t key = 0; key < tile.n; ++key)
      for (int row = 0; row < R; ++row)
        if (!sees(job, span, group.first_row + row, tile.first_key + key)) scores[key * P + row] = -INFINITY;
  alignas(64) float alpha[W];
  weigh_keys<W, P>(scores, tile.n, group, alpha);
  constexpr int upper = R <= 4 ? R : (R + 1) / 2, lower = R - upper;
  add_values<W, T, upper, P, kColumns<W, upper>>(scores, tile, head, 0, job.d, alpha, group.out, padded);
  if constexpr (lower > 0)
    add_values<W, T, lower, P, kColumns<W, lower>>(scores + upper, tile, head, 0, job.d, alpha + upper,
                                                group.out + upper * padded, padded);
}

template <int W, class T, int R = kGroupRows>
FOVEATE_INLINE void dispatch_rows(const AttentionJob& job, const AttentionSpan& span, const StreamTile<T>& tile,
                                  std::int64_t head, const StreamGroup& group, std::int64_t padded, float* scores) {
  if (group.n_rows == R) return attend_group<W, T, R>(job, span, tile, head, group, padded, scores);
  if constexpr (R > 1) dispatch_rows<W, T, R - 1>(job, span, tile, head, group, padded, scores);
}

constexpr int kMaxGroups = 64;  // row groups of an item, over its key heads

// Splits the rows of the item evenly into groups; the number of groups over all key heads.
template <int W>
int make_groups(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, float* floats,
                StreamGroup* groups) {
  const std::int64_t padded = round_up(job.d, W);
  const std::int64_t per_head = round_up(item.n_rows, kGroupRows) / kGroupRows;
  const std::int64_t size = round_up(item.n_rows, per_head) / per_head;
  int n = 0;
  for (std::int64_t head = 0; head < item.n_kv; ++head) {
    for (std::int64_t first = 0; first < item.n_rows; first += size) {
      const std::int64_t rows = std::min(size, item.n_rows - first);
      float *q = floats, *out = q + rows * padded, *max = out + rows * padded, *sum = max + W;
      floats = sum + W;
      std::fill(q, max, 0.0f);
      std::fill_n(max, W, kLowest);
      std::fill_n(sum, W, 0.0f);
      for (std::int64_t row = 0; row < rows; ++row) {
        const float* from = query(job, span, item.kv + head, item.first_row + first + row);
        for (std::int64_t i = 0; i < job.d; ++i) q[row * padded + i] = from[i] * (job.scale * kLog2e);
      }
      groups[n++] = {item.first_row + first, int(rows), q, out, max, sum};
    }
  }
  return n;
}

template <int W>
void finish_groups(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, int n_groups,
                   const StreamGroup* groups, float* partials) {
  const std::int64_t padded = round_up(job.d, W);
  const int per_head = n_groups / int(item.n_kv);
  for (int g = 0; g < n_groups; ++g) {
    const StreamGroup& group = groups[g];
    const int lanes = group.n_rows <= 1 ? 1 : group.n_rows <= 2 ? 2 : group.n_rows <= 4 ? 4 : 8;
    for (int row = 0; row < group.n_rows; ++row) {
      float total = 0;
      for (int lane = row; lane < W; lane += lanes) total += group.sum[lane];
      finish_part<W>(job, span, item, g / per_head, group.first_row - item.first_row + row, group.out + row * padded,
                     total, group.max[row], partials);
    }
  }
}

template <int W, class T>
void stream_tiles(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, float* partials) {
  const std::int64_t rows = item.n_kv * item.n_rows, padded = round_up(job.d, W);
  Scratch scratch(2 * rows * (padded + W) + kKeys * kGroupRows + 16);
  float* scores = scratch.take(kKeys * kGroupRows);
  StreamGroup groups[kMaxGroups];
  const int n_groups = make_groups<W>(job, span, item, scratch.take(2 * rows * (padded + W)), groups);
  const int per_head = n_groups / int(item.n_kv);
  StreamTile<T> tile;
  for (std::int64_t first = item.first_key; first < item.end_key; first += kKeys) {
    tile.first_key = first;
    tile.n = std::min(kKeys, item.end_key - first);
    const std::int64_t known = std::min(kKeys + kAhead, item.end_key - first);
    locate<T>(job, span, item.kv, first, known, tile.keys, tile.values);
    std::fill(tile.keys + known, tile.keys + kKeys + kAhead, tile.keys[known - 1]);
    std::fill(tile.values + known, tile.values + kKeys + kAhead, tile.values[known - 1]);
    for (int g = 0; g < n_groups; ++g)
      dispatch_rows<W, T>(job, span, tile, g / per_head * job.d, groups[g], padded, scores);
  }
  finish_groups<W>(job, span, item, n_groups, groups, partials);
}

template <int W>
void stream(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, float* partials) {
  if (job.stored == Stored::kFloat32) return stream_tiles<W, float>(job, span, item, partials);
  stream_tiles<W, bf16>(job, span, item, partials);
}

}  // namespace
}  // namespace foveate
