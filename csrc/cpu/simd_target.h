// Which instruction set the CPU kernels use: decided once, from the processor and GEMMASCOPE_FAST_CPU.
//
// A file csrc/cpu/simd/<name>.cpp is compiled once per target into namespace gemmascope_fast::{generic,avx2,avx512,neon};
// its header csrc/cpu/simd/<name>.h declares a table of function pointers and `const Table& <name>_table(SimdTarget)`.
#pragma once

namespace gemmascope_fast {

// kAvx2Vnni: the code of avx2, with the screening tile of processors that have AVX-VNNI, or AVX-512's form of it.
// kAvx512Amx: the code of avx512, with the screening tile in AMX's registers.
enum class SimdTarget { kGeneric, kAvx2, kAvx2Vnni, kAvx512, kAvx512Amx, kNeon };

// True when this build has the target's code and this processor can run it.
bool simd_target_available(SimdTarget target);

// Best available target, or the one GEMMASCOPE_FAST_CPU={generic,avx2,avx2_vnni,avx512,avx512_amx,neon} names. Throws std::runtime_error when
// that name is unknown or not available.
SimdTarget simd_target();

const char* simd_target_name(SimdTarget target);

// True for the targets that the namespace avx2 serves.
inline bool is_avx2(SimdTarget target) {
  return target == SimdTarget::kAvx2 || target == SimdTarget::kAvx2Vnni;
}

// Likewise avx512.
inline bool is_avx512(SimdTarget target) {
  return target == SimdTarget::kAvx512 || target == SimdTarget::kAvx512Amx;
}

// Whether vpdpbusd on 256 bits exists: in AVX-VNNI's encoding, or in that of AVX-512.
bool has_avx_vnni();
bool has_avx512_vnni();
// Whether AMX multiplies int8 and the operating system lets this process use it, which is asked for here.
bool has_amx();
// Whether NEON's int8 dot products exist.
bool has_sdot();

}  // namespace gemmascope_fast
