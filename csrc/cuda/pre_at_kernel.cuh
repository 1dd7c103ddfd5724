// Device code of pre_at: pre-activations of given (token, latent) pairs, one warp per pair.
//
//   pre[p] = <x[rows[p]], W[latents[p]]> + bias[latents[p]]      x [n, d], W [F, d]
//
// Bound by reading a row of W per pair.
#pragma once

#include "cuda/pair_dot.cuh"

namespace gemmascope_fast {

struct PreAt {
  Rows x;                         // [n, d]
  Rows W;                         // [F, d]
  const float* bias;              // [F]
  const int64_t *rows, *latents;  // [pairs]
  int64_t pairs;
  float* pre;  // [pairs], 0 where a row or a latent is out of range
};

__global__ void __launch_bounds__(kPairThreads, 6) pre_at_kernel(PreAt p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPairWarps;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kPairWarps + threadIdx.x / kWarp;
       at < p.pairs; at += step) {
    const int64_t row = p.rows[at], latent = p.latents[at];
    float pre = 0.0f;
    if (row >= 0 && row < p.x.rows && latent >= 0 && latent < p.W.rows) {
      pre = pair_dot(p.W, latent, p.x, row, lane) + p.bias[latent];
    }
    if (lane == 0) p.pre[at] = pre;
  }
}

}  // namespace gemmascope_fast
