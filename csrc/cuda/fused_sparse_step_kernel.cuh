// What fused_sparse_step makes of a latent's sums: Adam on row j of W_dec and of W_enc.t(), without gradient buffers.
//
// Both rows of sums are laid out in the shared memory that the pass is done with, which frees their registers: the
// update needs fewer than the walk. What it reads besides is on its way, and its powers are computed, while the walk
// waits for its first rows. A latent without entries whose rows are not live costs two loads. Bits are those of
// sae_backward and adam_step_: the same walk, the same update.
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
    const int column = (k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kChunk;
    if (column >= static_cast<int>(cols)) break;
    float4* to = reinterpret_cast<float4*>(row + column);
    to[0] = make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
    to[1] = make_float4(sums[k][4], sums[k][5], sums[k][6], sums[k][7]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) nonzero |= sums[k][i] != 0.0f;
  }
  return nonzero;
}

struct AdamFinish {
  AdamView encoder, decoder;

  struct Shared {
    AdamShared decoder, encoder;
    bool live[2];  // decoder, encoder
  };

  // Three CTAs where the sums of the pass leave room: while one waits for rows of x, another computes. From 10.0 on the
  // compiler needs more registers than that leaves (feature_blocks).
  static constexpr int blocks(int K, int capability) { return K == 4 || capability >= 100 ? 2 : 3; }

  // What the update will read, on its way into the L2.
  __device__ static void fetch_moments(const AdamView& a, int64_t latent) {
    if (a.exp_avg != nullptr) fetch_row(a.exp_avg + latent * a.exp_avg_stride, a.cols * 4);
    if (a.codes != nullptr) {
      fetch_row(a.codes + latent * a.exp_avg_sq_stride, a.cols);
    } else {
      fetch_row(a.exp_avg_sq + latent * a.exp_avg_sq_stride, a.cols * 4);
    }
  }

  // Powers take two thousand cycles of a thread: here they cost none of the others anything.
  __device__ void begin(int64_t latent, Shared* shared) const {
    fetch_moments(decoder, latent);  // its weights are there for the dot products
    fetch_moments(encoder, latent);
    fetch_row(weight_row(encoder, latent),
              encoder.cols * (encoder.weight_dtype == kFloat32 ? 4 : 2));
    if (threadIdx.x >= 4) return;
    const bool first = threadIdx.x % 2 == 0, of_decoder = threadIdx.x < 2;
    const int64_t at = of_decoder ? decoder.touched_at[latent] : encoder.touched_at[latent];
    const int64_t step = of_decoder ? decoder.step : encoder.step;
    const int64_t tail = of_decoder ? decoder.tail : encoder.tail;
    const double beta1 = of_decoder ? decoder.beta1 : encoder.beta1;
    const double beta2 = of_decoder ? decoder.beta2 : encoder.beta2;
    AdamShared* to = of_decoder ? &shared->decoder : &shared->encoder;
    if (first) shared->live[of_decoder ? 0 : 1] = adam_live(at, step, tail);
    to->decays[first ? 0 : 1] = adam_power(first ? beta1 : beta2, adam_gap(at, step, tail));
  }

  __device__ static void update(const AdamView& a, int64_t latent, bool nonzero, bool live,
                                float* row, AdamShared* shared) {
    if (!nonzero && !live) return;
    const bool parallel = nonzero && a.remove_parallel;
    if (parallel) {
      measure_parallel(a, latent, row, shared);
      __syncthreads();
    }
    move_row(a, latent, row, nonzero, parallel, shared);
  }

  template <int K>
  __device__ void operator()(int64_t latent, int64_t entries, FeatureSums<K>& sums, uint4* memory,
                             Shared* shared) const {
    if (entries <= 0) {
      if (!adam_live(decoder.touched_at[latent], decoder.step, decoder.tail) &&
          !adam_live(encoder.touched_at[latent], encoder.step, encoder.tail)) {
        return;
      }
      begin(latent, shared);
    }
    float* decoder_row = reinterpret_cast<float*>(memory);
    float* encoder_row = decoder_row + padded_columns(decoder.cols);
    const bool decoder_nonzero = lay_out(sums.dec, decoder.cols, decoder_row);
    const bool encoder_nonzero = lay_out(sums.enc, encoder.cols, encoder_row);
    const bool touched[2] = {__syncthreads_or(decoder_nonzero) != 0,
                             __syncthreads_or(encoder_nonzero) != 0};
    // One code for both: the instruction cache does not hold two.
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool first = side == 0;
      update(first ? decoder : encoder, latent, first ? touched[0] : touched[1], shared->live[side],
             first ? decoder_row : encoder_row, first ? &shared->decoder : &shared->encoder);
    }
  }
};

}  // namespace gemmascope_fast
