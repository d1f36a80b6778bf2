// The Python module `foveate.kernels._cpu`. Tensors come as addresses: the callers in kernels/*.py check their shapes,
// strides and dtypes, and no header of torch is needed to build this. This file alone includes pybind11, and it asks
// for no instruction set: inline code of a library, compiled for one, would run on machines without it.
#include <pybind11/pybind11.h>

#include "elementwise.h"
#include "runtime.h"

PYBIND11_MODULE(_cpu, module) {
  using namespace foveate;
  module.def("probe", [] { return static_cast<int>(probe()); });
  module.def("set_level", [](int to) { level = static_cast<Level>(to); });
  module.def("use_openmp", &use_openmp);
  module.def("rms_norm", &rms_norm);
  module.def("layer_norm", &layer_norm);
  module.def("rotate", &rotate);
  module.def("store_float32", &store_float32);
  module.def("store_bfloat16", &store_bfloat16);
}
