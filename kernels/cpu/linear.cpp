#include "linear.h"

namespace foveate {

void linear(const Linear& problem) {
  if (level >= kAvx512) return linear_avx512(problem);
  linear_avx2(problem);
}

}  // namespace foveate
