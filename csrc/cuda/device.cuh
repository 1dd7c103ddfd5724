// What device code includes instead of the CUDA headers: nvcc compiles it for GPUs, and a C++ compiler for the tests,
// where its kernels run on the CPU (testing/cuda_on_cpu.h).
#pragma once

#include <stdint.h>

// Compute capability that device code is compiled for: 80, 90, 120, ...; 0 in host code. It may decide launch bounds.
namespace gemmascope_fast {
#ifdef __CUDA_ARCH__
constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kCapability = 0;
#endif
}  // namespace gemmascope_fast

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

// The dynamic shared memory of the block, as a `type*` called `name`. 16-byte loads need no more than its alignment.
#define GSF_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char gsf_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(gsf_dynamic_shared)

#else

#include "testing/cuda_on_cpu.h"

#endif
