// Float operations that are rounded one by one, on either side: the compiler may not make an fma of two of them.
//
// On the device the intrinsics promise that whatever --fmad says; on the host it takes -ffp-contract=off.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>

#if defined(__CUDACC__) || defined(__host__)
#define GSF_BOTH __host__ __device__ inline
#else
#define GSF_BOTH inline
#endif

namespace gemmascope_fast {

#if defined(__CUDA_ARCH__)
GSF_BOTH float rounded_add(float a, float b) { return __fadd_rn(a, b); }
GSF_BOTH float rounded_sub(float a, float b) { return __fsub_rn(a, b); }
GSF_BOTH float rounded_mul(float a, float b) { return __fmul_rn(a, b); }
GSF_BOTH float rounded_div(float a, float b) { return __fdiv_rn(a, b); }
GSF_BOTH float rounded_sqrt(float a) { return __fsqrt_rn(a); }
GSF_BOTH double rounded_add(double a, double b) { return __dadd_rn(a, b); }
GSF_BOTH double rounded_mul(double a, double b) { return __dmul_rn(a, b); }
#else
GSF_BOTH float rounded_add(float a, float b) { return a + b; }
GSF_BOTH float rounded_sub(float a, float b) { return a - b; }
GSF_BOTH float rounded_mul(float a, float b) { return a * b; }
GSF_BOTH float rounded_div(float a, float b) { return a / b; }
GSF_BOTH float rounded_sqrt(float a) { return std::sqrt(a); }
GSF_BOTH double rounded_add(double a, double b) { return a + b; }
GSF_BOTH double rounded_mul(double a, double b) { return a * b; }
#endif

GSF_BOTH uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof(bits));
  return bits;
}

GSF_BOTH float float_of(uint32_t bits) {
  float a;
  memcpy(&a, &bits, sizeof(a));
  return a;
}

}  // namespace gemmascope_fast
