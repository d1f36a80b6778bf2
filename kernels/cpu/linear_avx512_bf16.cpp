// bfloat16 weights by inputs rounded to bfloat16, two products a lane and instruction.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "linear.h"
#include "runtime.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#include "simd.h"

#include "linear_float.h"

namespace foveate {
namespace {

template <int R, int P>
struct Bf16Form : Tiles<Bf16Form<R, P>, R, P> {
  static constexpr int kGroup = 2, kStep = 2, kBits = 16;
  static constexpr std::int64_t kChunk = 512;

  static std::int64_t row_bytes(std::int64_t k) { return k * 2; }

  // [k / 2, rows, 2]
  static void pack(const Linear& p, std::int64_t row, std::int64_t rows, std::int64_t k, char* to) {
    auto* out = reinterpret_cast<bf16*>(to);
    const float* x = p.x + row * p.x_stride;
    for (std::int64_t i = 0; i < k; ++i)
      for (std::int64_t r = 0; r < rows; ++r)
        set(out[(i / 2 * rows + r) * 2 + i % 2], i < p.k ? x[r * p.x_stride + i] : 0.0f);
  }

  template <int Rows, int Panels>
  static void run(const Visit& visit) {
    const auto* x = reinterpret_cast<const std::int32_t*>(visit.x) + visit.k0 / 2 * Rows;
    const char *w = visit.weights, *ahead = visit.ahead;
    vf<16> acc[Rows][Panels];
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Panels; ++p)
        acc[r][p] = visit.k0 ? load<16>(visit.sums + p * visit.panel_sums + r * kPanel) : vf<16>{};
    for (std::int64_t i = 0; i < visit.k / 2; ++i, w += 64, x += Rows, ahead += visit.ahead_step) {
      __m512i weights[Panels];
      for (int p = 0; p < Panels; ++p) {
        _mm_prefetch(ahead + p * visit.ahead_panel_bytes, _MM_HINT_T0);
        weights[p] = _mm512_loadu_si512(w + p * visit.panel_bytes);
      }
      for (int r = 0; r < Rows; ++r)
        for (int p = 0; p < Panels; ++p)
          acc[r][p] = (vf<16>)_mm512_dpbf16_ps((__m512)acc[r][p], (__m512bh)_mm512_set1_epi32(x[r]),
                                               (__m512bh)weights[p]);
    }
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Panels; ++p) store<16>(visit.sums + p * visit.panel_sums + r * kPanel, acc[r][p]);
  }
};

}  // namespace

void linear_avx512_bf16(const Linear& p) { Drive<16, Bf16Form<12, 2>>(p).run(); }

}  // namespace foveate
