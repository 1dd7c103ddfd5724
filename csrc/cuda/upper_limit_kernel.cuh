// What kUpperBound compares with (encode_tiles.cuh), a thread per latent: codes per unit, and the same times
// -(bias + c . w).
#pragma once

#include "cuda/screened_rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kUpperLimitThreads = 256;

__global__ void __launch_bounds__(kUpperLimitThreads)
    upper_limit_kernel(const LatentCodes* latents, const float* bias, int64_t d_sae, float* units,
                       float* limit) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= d_sae) return;
  units[j] = latents[j].scale;
  limit[j] = -(bias[j] + latents[j].dot) * latents[j].scale;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
