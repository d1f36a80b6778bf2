// The Python module `foveate.kernels._cpu`. Tensors come as addresses: the callers in kernels/cpu/*.py check their
// shapes, strides and dtypes, and no header of torch is needed to build this. This file alone includes pybind11, and it
// asks for no instruction set: inline code of a library, compiled for one, would run on machines without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "decoder.h"
#include "elementwise.h"
#include "linear.h"
#include "pack.h"
#include "runtime.h"
#include "sampling.h"

namespace {

// As many plain arguments as the Python side passes; an address of 0 is no tensor.
void call_linear(std::uintptr_t x, std::int64_t x_stride, std::int64_t m, std::int64_t n, std::int64_t k,
                 std::uintptr_t data, std::uintptr_t scales, int form, bool round_inputs, std::uintptr_t bias,
                 std::uintptr_t residual, std::int64_t residual_stride, int activation, std::uintptr_t out) {
  const auto values = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
  foveate::linear({values(x), x_stride, m, n, k, values(data), values(scales), foveate::Form(form), round_inputs,
                   values(bias), values(residual), residual_stride, foveate::Activation(activation),
                   reinterpret_cast<float*>(out)});
}

// `w` holds the fields of Decoder but eps and scale, in their order.
void call_decoder(const std::vector<std::int64_t>& w, float eps, float scale) {
  const auto values = [](std::int64_t address) { return reinterpret_cast<float*>(address); };
  const auto ints = [](std::int64_t address) { return reinterpret_cast<const std::int32_t*>(address); };
  foveate::run_decoder({values(w[0]), w[1], w[2], values(w[3]), values(w[4]), eps,
                        reinterpret_cast<const foveate::Layer*>(w[5]), w[6], w[7], w[8], w[9], std::uintptr_t(w[10]),
                        std::uintptr_t(w[11]), w[12] != 0, w[13], ints(w[14]), ints(w[15]), ints(w[16]), w[17], w[18],
                        w[19], reinterpret_cast<const std::int64_t*>(w[20]), w[21], scale});
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using namespace foveate;
  module.def("probe", [] { return static_cast<int>(probe()); });
  module.def("set_level", [](int to) { level = static_cast<Level>(to); });
  module.def("use_openmp", &use_openmp);
  module.def("rms_norm", &rms_norm);
  module.def("layer_norm", &layer_norm);
  module.def("rotate", &rotate);
  module.def("linear", &call_linear);
  module.def("run_decoder", &call_decoder);
  module.def("distrust_linear", [](int at) { linear_distrusted[at] = true; });
  module.def("pack", &pack);
  module.def("store_float32", &store_float32);
  module.def("store_bfloat16", &store_bfloat16);
  module.def("paged_attention", &paged_attention);
  module.def("vision_attention", &vision_attention);
  module.def("largest", &largest);
  module.def("draw", &draw);
}
