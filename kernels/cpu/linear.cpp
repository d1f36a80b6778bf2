#include "linear.h"

namespace foveate {

bool linear_distrusted[kLevels] = {};

void linear(const Linear& p) {
  const bool quantized = p.form == Form::kInt8 || p.form == Form::kInt4;
  const bool rounds = p.form == Form::kBfloat16 && p.round_inputs;
  const auto runs = [](Level at) { return level >= at && !linear_distrusted[at]; };
  if (p.m == 0) return;
  if (runs(kAmx) && (quantized || (rounds && p.k % 32 == 0))) return linear_amx(p);
  if (runs(kAvx512Bf16) && rounds) return linear_avx512_bf16(p);
  if (runs(kAvx512)) return linear_avx512(p);
  linear_avx2(p);
}

}  // namespace foveate
