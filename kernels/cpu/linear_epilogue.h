// What follows the product: bias, activation or gate, residual, and the way from panels of 16 columns to rows of out.
// For W lanes; include it after `#pragma GCC target(...)`, simd.h and linear.h.
#pragma once

namespace foveate {
namespace {

constexpr std::int64_t kPanel = 16;  // columns of out that one panel of weights makes

template <int W, Activation A>
FOVEATE_INLINE vf<W> activate(vf<W> v) {
  if constexpr (A == Activation::kSilu) return silu<W>(v);
  if constexpr (A == Activation::kQuickGelu) return quick_gelu<W>(v);
  if constexpr (A == Activation::kGeluTanh) return gelu_tanh<W>(v);
  if constexpr (A == Activation::kGelu) return gelu<W>(v);
  return v;
}

// `count` values of 16 at p, the others 0; none at all from a null p.
FOVEATE_INLINE const float* sixteen(const float* p, std::int64_t count, float* room) {
  if (p && count >= kPanel) return p;
  std::memset(room, 0, kPanel * sizeof(float));
  if (p) std::memcpy(room, p, count * sizeof(float));
  return room;
}

// Finishes one panel (a pair of them behind a gate) of `rows` rows from `row`, whose sums [rows, 16] are at `sums`, and
// for a gate those of the second projection at `others`. `column` is the first of out.
template <int W, Activation A>
void finish(const Linear& p, const float* sums, const float* others, std::int64_t row, std::int64_t rows,
            std::int64_t column) {
  constexpr bool gate = A == Activation::kSiluGate;
  const std::int64_t width = gate ? p.n / 2 : p.n, count = std::min(kPanel, width - column);
  float bias_room[kPanel], other_room[kPanel], residual_room[kPanel], out_room[kPanel];
  const float* bias = sixteen(p.bias ? p.bias + column : nullptr, count, bias_room);
  const float* other_bias = gate ? sixteen(p.bias ? p.bias + width + column : nullptr, count, other_room) : nullptr;
  for (std::int64_t r = 0; r < rows; ++r) {
    float* to = p.out + (row + r) * width + column;
    const float* residual = p.residual ? p.residual + (row + r) * p.residual_stride + column : nullptr;
    residual = sixteen(residual, count, residual_room);
    float* at = count < kPanel ? out_room : to;
    for (int j = 0; j < kPanel; j += W) {
      vf<W> v = load<W>(sums + r * kPanel + j) + load<W>(bias + j);
      if constexpr (gate)
        v = silu<W>(v) * (load<W>(others + r * kPanel + j) + load<W>(other_bias + j));
      else
        v = activate<W, A>(v);
      store<W>(at + j, v + load<W>(residual + j));
    }
    if (count < kPanel) std::memcpy(to, out_room, count * sizeof(float));
  }
}

// Finishes the panels first..last-1 of a row block; their sums lie one panel after the other.
template <int W, Activation A>
void finish_panels(const Linear& p, const float* sums, std::int64_t row, std::int64_t rows, std::int64_t first,
                   std::int64_t last) {
  constexpr bool gate = A == Activation::kSiluGate;
  for (std::int64_t panel = first; panel < last; panel += gate ? 2 : 1, sums += (gate ? 2 : 1) * rows * kPanel)
    finish<W, A>(p, sums, sums + rows * kPanel, row, rows, (gate ? panel / 2 : panel) * kPanel);
}

template <int W>
using Finish = void (*)(const Linear&, const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t);

template <int W>
Finish<W> finisher(Activation activation) {
  switch (activation) {
    case Activation::kNone: return finish_panels<W, Activation::kNone>;
    case Activation::kSilu: return finish_panels<W, Activation::kSilu>;
    case Activation::kQuickGelu: return finish_panels<W, Activation::kQuickGelu>;
    case Activation::kGeluTanh: return finish_panels<W, Activation::kGeluTanh>;
    case Activation::kGelu: return finish_panels<W, Activation::kGelu>;
    case Activation::kSiluGate: return finish_panels<W, Activation::kSiluGate>;
  }
  return nullptr;
}

}  // namespace
}  // namespace foveate
