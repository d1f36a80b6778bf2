// Attention on vectors of 16 floats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "attention_job.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "simd.h"

#include "attention_stream.h"
#include "attention_tile.h"

namespace foveate {

const AttentionKernels attention_avx512 = {kTileM<16>, &stream<16>, &tile<16>, &merge_parts<16>};

}  // namespace foveate
