// What the two attention kernels share. Include it after `#pragma GCC target(...)` and "simd.h".
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "attention_job.h"

namespace foveate {
namespace {

constexpr std::int64_t kKeys = 64;     // scored at a time
constexpr float kLowest = -1e30f;      // a maximum over nothing: finite, so that its distance to itself is 0
constexpr float kLog2e = 1.44269504f;  // scores are kept in binary logarithms

FOVEATE_INLINE std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// 2^x for x <= 0 within 2e-7 relative; 0 below -126; a NaN stays one. A minimax polynomial on [-1/2, 1/2].
template <int W>
FOVEATE_INLINE vf<W> exp2(vf<W> x) {
  const vf<W> inside = x < -126.0f ? set1<W>(-126.0f) : x;
  const vf<W> magic = set1<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf<W> shifted = inside + magic;
  const vf<W> f = inside - (shifted - magic);
  vf<W> p = f * 1.3264727236e-3f + 9.6715126474e-3f;
  p = p * f + 5.5507337431e-2f;
  p = p * f + 2.4022242085e-1f;
  p = p * f + 6.9314697760e-1f;
  p = p * f + 1.0f;
  const vf<W> power = (vf<W>)(((vi<W>)shifted - (vi<W>)magic + 127) << 23);
  return x < -126.0f ? vf<W>{} : p * power;
}

// The first n < W values at p, then zeros; nothing behind them is read.
template <int W>
FOVEATE_INLINE vf<W> load_part(const float* p, std::int64_t n) {
  if constexpr (W == 16) return (vf<W>)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  float lanes[W] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<W>(lanes);
}
template <int W>
FOVEATE_INLINE vf<W> load_part(const bf16* p, std::int64_t n) {
  bf16 lanes[W] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<W>(lanes);
}

template <int W>
using Lanes = std::make_integer_sequence<int, W>;

// Lane i is a[i] where bit S of i is clear, else b[i].
template <int W, int S, int... L>
FOVEATE_INLINE vf<W> blend(vf<W> a, vf<W> b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (L & S ? W + L : L)...);
}

// Lane i is a[i ^ S].
template <int W, int S, int... L>
FOVEATE_INLINE vf<W> swap(vf<W> a, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, a, (L ^ S)...);
}

struct Add {
  template <class V>
  FOVEATE_INLINE V operator()(V a, V b) const { return a + b; }
};
struct Max {
  template <class V>
  FOVEATE_INLINE V operator()(V a, V b) const { return a > b ? a : b; }
};

// Lane i becomes the sum (or maximum) of all lanes of a[i]; spoils a.
template <int W, class Op, int S = 1>
FOVEATE_INLINE vf<W> reduce(vf<W>* a, Op op) {
  for (int i = 0; i < W; i += 2 * S) {
    const vf<W> low = a[i], high = a[i + S];
    a[i] = op(blend<W, S>(low, high, Lanes<W>{}), swap<W, S>(blend<W, S>(high, low, Lanes<W>{}), Lanes<W>{}));
  }
  if constexpr (2 * S < W) return reduce<W, Op, 2 * S>(a, op);
  return a[0];
}

// Lane i becomes the sum (or maximum) of the lanes j with j % S == i % S.
template <int W, int S, class Op>
FOVEATE_INLINE vf<W> fold(vf<W> a, Op op) {
  if constexpr (S < W) return fold<W, 2 * S>(op(a, swap<W, S>(a, Lanes<W>{})), op);
  return a;
}

// The W x W matrix whose rows are a[0..W-1] becomes its transpose.
template <int W, int S = 1>
FOVEATE_INLINE void transpose(vf<W>* a) {
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const vf<W> low = a[i], high = a[i + S];
    a[i] = blend<W, S>(low, swap<W, S>(high, Lanes<W>{}), Lanes<W>{});
    a[i + S] = blend<W, S>(swap<W, S>(low, Lanes<W>{}), high, Lanes<W>{});
  }
  if constexpr (2 * S < W) transpose<W, 2 * S>(a);
}

// Floats of a thread that outlive the call: fresh pages cost more than what is written to them.
class Scratch {
 public:
  explicit Scratch(std::int64_t n) {
    if (n > kept_.size) {
      std::free(kept_.data);
      kept_.size = round_up(n, 16);
      kept_.data = static_cast<float*>(std::aligned_alloc(64, kept_.size * sizeof(float)));
    }
    next_ = kept_.data;
  }
  float* take(std::int64_t n) {
    float* taken = next_;
    next_ += round_up(n, 16);
    return taken;
  }

 private:
  struct Kept {
    float* data = nullptr;
    std::int64_t size = 0;
    ~Kept() { std::free(data); }
  };
  static thread_local Kept kept_;
  float* next_;
};
thread_local Scratch::Kept Scratch::kept_;

// Where the keys [first, first + n) of head `kv` lie, and the values.
template <class T>
void locate(const AttentionJob& job, const AttentionSpan& span, std::int64_t kv, std::int64_t first, std::int64_t n,
            const T** keys, const T** values) {
  const auto* key_base = static_cast<const T*>(job.keys) + kv * job.d;
  const auto* value_base = static_cast<const T*>(job.values) + kv * job.d;
  std::int64_t block = span.table ? first / job.block_tokens : 0;
  std::int64_t offset = span.table ? first % job.block_tokens : span.first_query + first;
  for (std::int64_t i = 0; i < n; ++i, ++offset) {
    if (span.table && offset == job.block_tokens) ++block, offset = 0;
    const std::int64_t slot = span.table ? span.table[block] * job.block_tokens + offset : offset;
    keys[i] = key_base + slot * job.key_stride;
    values[i] = value_base + slot * job.value_stride;
  }
}

// Asks for a row of d values.
template <class T>
FOVEATE_INLINE void prefetch(const T* row, std::int64_t d) {
  for (std::int64_t byte = 0; byte < d * std::int64_t(sizeof(T)); byte += 64)
    _mm_prefetch(reinterpret_cast<const char*>(row) + byte, _MM_HINT_T0);
}

// Query `row` of head `kv`, whose scores are to be binary logarithms.
FOVEATE_INLINE const float* query(const AttentionJob& job, const AttentionSpan& span, std::int64_t kv,
                                  std::int64_t row) {
  return job.q + (span.first_query + row / job.group) * job.q_stride + (kv * job.group + row % job.group) * job.d;
}

// How many of the keys a causal row sees.
FOVEATE_INLINE std::int64_t limit(const AttentionJob& job, const AttentionSpan& span, std::int64_t row) {
  return span.causal ? span.length - span.m + row / job.group + 1 : span.length;
}

// Whether `row` sees key j < length.
FOVEATE_INLINE bool sees(const AttentionJob& job, const AttentionSpan& span, std::int64_t row, std::int64_t j) {
  const std::int64_t old = span.length - span.m;
  return span.tree && j >= old ? span.tree[row / job.group * span.m + j - old] : j < limit(job, span, row);
}

// The result of a row, from weighted values, the sum of the weights, and the maximum both are relative to.
template <int W>
void finish(const AttentionJob& job, const AttentionSpan& span, std::int64_t kv, std::int64_t row, const float* values,
            float sum, float max) {
  const std::int64_t token = span.first_query + row / job.group, head = kv * job.group + row % job.group;
  float* out = job.out + token * job.out_stride + head * job.d;
  const float scale = 1.0f / sum;
  std::int64_t i = 0;
  for (; i + W <= job.d; i += W) store<W>(out + i, load<W>(values + i) * scale);
  for (; i < job.d; ++i) out[i] = values[i] * scale;
  if (job.lse) job.lse[token * job.heads + head] = (max + std::log2(sum)) * (1 / kLog2e);
}

// The same, or, if its keys were split, as one of the partial results.
template <int W>
void finish_part(const AttentionJob& job, const AttentionSpan& span, const AttentionItem& item, std::int64_t head,
                 std::int64_t row, const float* values, float sum, float max, float* partials) {
  if (item.merge < 0) return finish<W>(job, span, item.kv + head, item.first_row + row, values, sum, max);
  const std::int64_t width = partial_width(job.d);
  float* to = partials + (item.partial + head * item.n_rows + row) * width;
  std::copy_n(values, job.d, to);
  to[width - 2] = sum;
  to[width - 1] = max;
}

// Adds the parts of each row in the order of their keys.
template <int W>
void merge_parts(const AttentionJob& job, const AttentionSpan& span, const AttentionMerge& merge,
                 const float* partials) {
  const std::int64_t width = partial_width(job.d), padded = width - 16, all = merge.n_kv * merge.n_rows;
  float* values = Scratch(padded).take(padded);
  for (std::int64_t i = 0; i < all; ++i) {
    const float* first = partials + (merge.partial + i) * width;
    float max = kLowest, sum = 0;
    for (std::int64_t part = 0; part < merge.n_parts; ++part)
      max = std::max(max, first[part * all * width + width - 1]);
    std::fill_n(values, padded, 0.0f);
    for (std::int64_t part = 0; part < merge.n_parts; ++part) {
      const float* from = first + part * all * width;
      const float weight = std::exp2(from[width - 1] - max);
      sum += weight * from[width - 2];
      for (std::int64_t j = 0; j < padded; j += W)
        store<W>(values + j, load<W>(values + j) + weight * load<W>(from + j));
    }
    finish<W>(job, span, merge.kv + i / merge.n_rows, merge.first_row + i % merge.n_rows, values, sum, max);
  }
}

}  // namespace
}  // namespace foveate
