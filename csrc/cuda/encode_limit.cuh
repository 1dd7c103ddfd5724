// JumpReLU's limit per latent, so that the encoder's tiles compare sums without their bias and decide exactly:
//
//   limit[j] = the largest float a with fl(a + bias[j]) <= threshold[j] - window
//   pre > threshold[j] - window   if and only if   acc > limit[j]
//
// fl(a + bias) does not fall as a rises, so a bisection over the floats in their order finds it in 32 steps. NaN where
// the threshold is NaN or the bias is not finite: such entries are decided one by one.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// The floats from -inf to +inf as ascending integers, and back.
__device__ __forceinline__ float float_at(int64_t position) {
  return position >= 0 ? __uint_as_float(static_cast<uint32_t>(position))
                       : __uint_as_float(static_cast<uint32_t>(-position - 1) | 0x80000000u);
}

__device__ __forceinline__ float encode_limit(float bias, float threshold, float window) {
  const float lower = threshold - window;
  const int64_t infinity = 0x7f800000;
  if (lower != lower || (__float_as_uint(bias) & 0x7f800000u) == 0x7f800000u) {
    return __uint_as_float(0x7fc00000u);
  }
  int64_t low = -infinity - 1, high = infinity;  // -inf always passes; the answer is in [low, high]
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (float_at(middle) + bias <= lower) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return float_at(low);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
