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

#include "linear_int.h"

namespace foveate {

void linear_avx2(const Linear& p) {
  switch (p.form) {
    case Form::kFloat32: return Drive<8, FloatForm<8, float, 6, 1>>(p).run();
    case Form::kBfloat16:
      if (p.m <= 16) return Drive<8, FloatForm<8, bf16, 4, 1>>(p).run();
      return Drive<8, WidenedForm<8, 6>>(p).run();
    case Form::kInt16: return Drive<8, IntForm<8, 16, 6, 1>>(p).run();
    case Form::kInt8: return Drive<8, IntForm<8, 8, 4, 1>>(p).run();
    case Form::kInt4: return Drive<8, IntForm<8, 4, 4, 1>>(p).run();
  }
}

}  // namespace foveate
