// What the planner of attention.cpp hands to the kernels of one instruction set. Plain data: it is compiled for many.
#pragma once
#include <cstdint>

namespace foveate {

// How keys and values lie in memory. Another storage type is a value here and an overload of `load` in the kernels.
enum class Stored { kFloat32, kBfloat16 };

// One call of an entry point. Strides are in values, from one token to the next; heads are packed inside a token.
struct AttentionJob {
  const float* q;
  std::int64_t q_stride;
  const void* keys;
  std::int64_t key_stride;
  const void* values;
  std::int64_t value_stride;
  Stored stored;
  float* out;
  std::int64_t out_stride;
  float* lse;  // [n_tokens, heads], or null
  std::int64_t heads, group, d;  // `group` query heads read one key head
  float scale;
  std::int64_t block_tokens;  // of a paged cache
};

// One sequence or segment: queries [first_query, + m) attend to `length` keys.
struct AttentionSpan {
  std::int64_t first_query, m, length;
  const std::int32_t* table;  // its blocks; null: key j is token first_query + j
  const bool* tree;           // [m, m] visible among the last m keys, or null
  bool causal;                // without a tree, query i sees keys j <= length - m + i; else all
};

// A piece of the work of one span: its rows (a row is a query and a head of the group, row = query * group + head)
// of `n_kv` key heads, over the keys [first_key, end_key).
struct AttentionItem {
  std::int64_t span, kv, n_kv, first_row, n_rows, first_key, end_key;
  std::int64_t merge;    // which of the merges it belongs to; -1: it sees all keys and writes the result
  std::int64_t partial;  // where its rows start in the partial results
};

// The items that split the keys of the same rows, in the order of the keys, one after the other in the partials.
struct AttentionMerge {
  std::int64_t span, kv, n_kv, first_row, n_rows, partial, n_parts;
};

// The kernels of one instruction set. `stream` reads keys as they lie, for few rows; `tile` repacks them, for many.
// `partials` holds rows of partial_width(d) floats: the sums over d, the sum of the weights, and the maximum they
// are relative to, in binary logarithms.
struct AttentionKernels {
  std::int64_t tile_rows;  // the rows of a tile item are best a multiple of this
  void (*stream)(const AttentionJob&, const AttentionSpan&, const AttentionItem&, float* partials);
  void (*tile)(const AttentionJob&, const AttentionSpan&, const AttentionItem&, float* partials);
  void (*merge)(const AttentionJob&, const AttentionSpan&, const AttentionMerge&, const float* partials);
};

constexpr std::int64_t partial_width(std::int64_t d) { return (d + 15) / 16 * 16 + 16; }

extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;

}  // namespace foveate
