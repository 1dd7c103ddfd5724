// White-box bindings for the tests. Ops are never bound here: they go through the torch dispatcher.
#include <pybind11/pybind11.h>

#include "cpu/simd_target.h"

namespace gemmascope_fast {

PYBIND11_MODULE(_testing, m) {
  pybind11::enum_<SimdTarget>(m, "SimdTarget")
      .value("generic", SimdTarget::kGeneric)
      .value("avx2", SimdTarget::kAvx2)
      .value("avx512", SimdTarget::kAvx512);
  m.def("simd_target", &simd_target);
  m.def("simd_target_available", &simd_target_available);
  m.def("simd_target_name", &simd_target_name);
}

}  // namespace gemmascope_fast
