// How much dynamic shared memory a kernel may be launched with.
#pragma once

#include <cuda_runtime_api.h>

namespace gemmascope_fast {

// Always the most that the current device gives a block, less the `own` bytes that the kernel has without asking: the
// limit is the kernel's, and another thread may launch it with less between the call and the launch.
inline cudaError_t raise_shared_limit(const void* kernel, int own) {
  int device = 0, per_block = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, per_block - own);
}

}  // namespace gemmascope_fast
