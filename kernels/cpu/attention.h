#pragma once
#include <cstdint>

namespace foveate {

// Softmax attention of packed float32 queries. Addresses of tensors; strides in values from one token to the next,
// heads packed inside a token.

// Over a paged cache of float32, or of bfloat16, contiguous [n_blocks, block_tokens, kv_heads, d].
// q, out: [n_tokens, heads, d]; lse float32 [n_tokens, heads].
// cu_queries [n_seqs + 1], kv_lengths [n_seqs], tables [n_seqs, table_stride]: int32.
// trees: 0, or the addresses int64 [n_seqs] of bool [m, m] masks, 0 for the causal rule.
void paged_attention(std::uintptr_t q, std::int64_t q_stride, std::uintptr_t keys, std::uintptr_t values,
                     bool bfloat16, std::uintptr_t cu_queries, std::uintptr_t kv_lengths, std::uintptr_t tables,
                     std::int64_t table_stride, std::uintptr_t trees, std::uintptr_t out, std::int64_t out_stride,
                     std::uintptr_t lse, std::int64_t n_seqs, std::int64_t heads, std::int64_t kv_heads,
                     std::int64_t d, std::int64_t block_tokens, float scale);

// Of every row to every row of its segment; q, k, v [n, heads, d] float32, out and lse packed, lse 0 if not wanted.
// cu_lengths: int32 [n_segments + 1].
void vision_attention(std::uintptr_t q, std::int64_t q_stride, std::uintptr_t k, std::int64_t k_stride,
                      std::uintptr_t v, std::int64_t v_stride, std::uintptr_t cu_lengths, std::uintptr_t out,
                      std::uintptr_t lse, std::int64_t n_segments, std::int64_t heads, std::int64_t d, float scale);

}  // namespace foveate
