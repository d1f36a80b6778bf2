// A run of decoder layers without a return to Python: the same kernels in the same order, so the same bits. What it
// saves is the time between them, in which memory idles.
#include "decoder.h"

#include <memory>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace foveate {
namespace {

std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }
const float* floats(std::int64_t address) { return reinterpret_cast<const float*>(address); }

// Floats of the calling thread that outlive the call.
float* scratch(std::int64_t n) {
  thread_local std::unique_ptr<float[]> kept;
  thread_local std::int64_t size = 0;
  if (n > size) kept.reset(new float[size = n]);
  return kept.get();
}

void multiply(const LayerMatrix& matrix, const float* x, std::int64_t m, Activation activation, const float* residual,
              float* out) {
  linear({x, matrix.k, m, matrix.n, matrix.k, floats(matrix.data), floats(matrix.scales), Form(matrix.form),
          matrix.round_inputs != 0, floats(matrix.bias), residual, matrix.n, activation, out});
}

void run_layer(const Decoder& run, std::int64_t index, float* normed, float* qkv, float* attended, float* gated) {
  const Layer& layer = run.layers[index];
  const std::int64_t n = run.n_rows, wide = layer.qkv.n, turned = run.heads * run.d;
  const std::int64_t narrow = run.kv_heads * run.d;
  rms_norm(address(run.rows), run.hidden, layer.attention_norm, address(normed), n, run.hidden, run.eps);
  multiply(layer.qkv, normed, n, Activation::kNone, nullptr, qkv);
  rotate(address(qkv), wide, address(run.cos), address(run.sin), n, run.heads + run.kv_heads, run.d / 2);
  (run.bfloat16 ? store_bfloat16 : store_float32)(
      address(qkv + turned), wide, address(qkv + turned + narrow), wide, address(run.slots + index * run.layer_slots),
      run.keys, run.values, n, narrow);
  paged_attention(address(qkv), wide, run.keys, run.values, run.bfloat16, address(run.cu_queries),
                  address(run.kv_lengths), address(run.tables + index * run.layer_tables), run.table_stride, 0,
                  address(attended), turned, 0, run.n_seqs, run.heads, run.kv_heads, run.d, run.block_tokens,
                  run.scale);
  multiply(layer.out, attended, n, Activation::kNone, run.rows, run.rows);
  rms_norm(address(run.rows), run.hidden, layer.mlp_norm, address(normed), n, run.hidden, run.eps);
  multiply(layer.gate_up, normed, n, Activation::kSiluGate, nullptr, gated);
  multiply(layer.down, gated, n, Activation::kNone, run.rows, run.rows);
}

}  // namespace

void run_decoder(const Decoder& run) {
  if (run.n_rows == 0 || run.n_layers == 0) return;
  const Layer& first = run.layers[0];
  const std::int64_t n = run.n_rows, attended = n * run.heads * run.d;
  float* normed = scratch(n * (run.hidden + first.qkv.n + first.gate_up.n / 2) + attended);
  float* qkv = normed + n * run.hidden;
  float* heads = qkv + n * first.qkv.n;
  for (std::int64_t i = 0; i < run.n_layers; ++i) run_layer(run, i, normed, qkv, heads, heads + attended);
}

}  // namespace foveate
