#pragma once
#include <cstdint>

namespace foveate {

// A matrix of a layer, as kernels/decoder.py writes it: addresses (0: none), then what `Linear` calls form,
// round_inputs, n and k.
struct LayerMatrix {
  std::int64_t data, scales, bias, form, round_inputs, n, k;
};

// A decoder layer: the addresses of its norms' weights, and its matrices.
struct Layer {
  std::int64_t attention_norm, mlp_norm;
  LayerMatrix qkv, out, gate_up, down;
};
static_assert(sizeof(Layer) == 30 * sizeof(std::int64_t), "as kernels/decoder.py writes it");

// Consecutive layers over a few rows. All is packed but where a stride is given; strides are in values.
struct Decoder {
  float* rows;  // [n_rows, hidden]; read and overwritten by the result
  std::int64_t n_rows, hidden;
  const float *cos, *sin;  // [n_rows, d / 2]
  float eps;
  const Layer* layers;
  std::int64_t n_layers;
  std::int64_t heads, kv_heads, d;
  // The paged cache and the batch, as for paged_attention; those of the layers lie one stride apart.
  std::uintptr_t keys, values;
  bool bfloat16;
  std::int64_t block_tokens;
  const std::int32_t *cu_queries, *kv_lengths, *tables;
  std::int64_t n_seqs, table_stride, layer_tables;
  const std::int64_t* slots;
  std::int64_t layer_slots;
  float scale;
};

// Norm, QKV, rotation, store, attention, output and residual, norm, gate and up, down and residual, layer by layer.
void run_decoder(const Decoder& run);

}  // namespace foveate
