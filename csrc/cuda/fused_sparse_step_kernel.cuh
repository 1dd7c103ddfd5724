// What fused_sparse_step makes of a latent's sums: Adam on row j of W_dec and of W_enc.t(), without gradient buffers.
//
// The sums are laid out in the shared memory that the pass is done with, where adam_row takes its gradient from: the
// threads of the pass hold 8 columns at a time, those of the update 4. A latent without entries whose rows are not live
// costs two loads. Bits are those of sae_backward and adam_step_: the same walk, the same update.
#pragma once

#include "cuda/adam_row.cuh"
#include "cuda/feature_pass_kernel.cuh"

namespace gemmascope_fast {

// Writes a thread's sums to their columns of `row`; whether one of them is not 0.
template <int K>
__device__ inline bool lay_out(const float (&sums)[K][kChunk], int64_t cols, float* row) {
  bool nonzero = false;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!holds<K>(cols, k, blockDim.x)) break;
    float4* to = reinterpret_cast<float4*>(row) + 2 * (k * blockDim.x + threadIdx.x);
    to[0] = make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
    to[1] = make_float4(sums[k][4], sums[k][5], sums[k][6], sums[k][7]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) nonzero |= sums[k][i] != 0.0f;
  }
  return nonzero;
}

struct AdamFinish {
  AdamView encoder, decoder;

  // An update takes 70 registers beside the sums of the other row; with fewer than 128 it spills.
  static constexpr int blocks(int) { return 2; }

  template <int K>
  __device__ static void update(const AdamView& a, int64_t latent, int64_t entries,
                                const float (&sums)[K][kChunk], float* row, AdamShared* shared) {
    if (entries <= 0 && !adam_live(a.touched_at[latent], a.step, a.tail)) return;
    const bool nonzero = lay_out(sums, a.cols, row);
    adam_row(a, latent, row, nonzero, shared);
    __syncthreads();  // the row has been read
  }

  template <int K>
  __device__ void operator()(int64_t latent, int64_t entries, FeatureSums<K>& sums,
                             uint4* memory) const {
    __shared__ AdamShared shared;
    float* row = reinterpret_cast<float*>(memory);
    update<K>(decoder, latent, entries, sums.dec, row, &shared);
    update<K>(encoder, latent, entries, sums.enc, row, &shared);
  }
};

}  // namespace gemmascope_fast
