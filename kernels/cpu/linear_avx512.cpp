#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "linear.h"
#include "runtime.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#include "simd.h"

#include "linear_int.h"

namespace foveate {

void linear_avx512(const Linear& p) {
  switch (p.form) {
    case Form::kFloat32: return Drive<16, FloatForm<16, float, 12, 2>>(p).run();
    case Form::kBfloat16: return Drive<16, FloatForm<16, bf16, 12, 2>>(p).run();
    case Form::kInt16: return Drive<16, IntForm<16, 16, 12, 2>>(p).run();
    case Form::kInt8: return Drive<16, IntForm<16, 8, 12, 2>>(p).run();
    case Form::kInt4: return Drive<16, IntForm<16, 4, 12, 2>>(p).run();
  }
}

}  // namespace foveate
