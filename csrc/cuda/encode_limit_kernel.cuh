// JumpReLU's limits (encode_limit.cuh), a thread per latent.
#pragma once

#include "cuda/encode_limit.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kLimitThreads = 256;

__global__ void __launch_bounds__(kLimitThreads)
    encode_limit_kernel(const float* bias, const float* threshold, float window, int64_t d_sae,
                        float* limit) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j < d_sae) limit[j] = encode_limit(bias[j], threshold[j], window);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
