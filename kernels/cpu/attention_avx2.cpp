// Attention on vectors of 8 floats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "attention_job.h"

#pragma GCC target("avx2,fma,f16c")
#include "simd.h"

#include "attention_stream.h"
#include "attention_tile.h"

namespace foveate {

const AttentionKernels attention_avx2 = {kTileM<8>, &stream<8>, &tile<8>, &merge_parts<8>};

}  // namespace foveate
