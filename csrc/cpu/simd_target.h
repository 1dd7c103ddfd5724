// Which instruction set the CPU kernels use: decided once, from the processor and GEMMASCOPE_FAST_CPU.
//
// A file csrc/cpu/simd/<name>.cpp is compiled once per target into namespace gemmascope_fast::{generic,avx2,avx512}; its
// header csrc/cpu/simd/<name>.h declares a table of function pointers and `const Table& <name>_table(SimdTarget)`.
#pragma once

namespace gemmascope_fast {

enum class SimdTarget { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

// True when this build has the target's code and this processor can run it.
bool simd_target_available(SimdTarget target);

// Best available target, or the one GEMMASCOPE_FAST_CPU={generic,avx2,avx512} names. Throws std::runtime_error when that
// name is unknown or not available.
SimdTarget simd_target();

const char* simd_target_name(SimdTarget target);

}  // namespace gemmascope_fast
