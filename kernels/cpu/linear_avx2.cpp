#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "linear.h"
#include "runtime.h"

#pragma GCC target("avx2,fma,f16c")
#include "simd.h"

#include "linear_float.h"

namespace foveate {

void linear_avx2(const Linear& p) {
  if (p.form == Form::kFloat32) return Drive<8, FloatForm<8, float, 6, 1>>(p).run();
  if (p.form == Form::kBfloat16) return Drive<8, FloatForm<8, bf16, 6, 1>>(p).run();
}

}  // namespace foveate
