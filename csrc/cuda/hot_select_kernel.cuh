// Device code that chooses the hot latents: those with the most entries, the first of equals first.
//
// Candidates are listed in any order; a candidate's row is the number of those before it, so that no row depends on
// timing. Bound by 12 bytes per latent, and by the square of the candidates, which are few.
#pragma once

#include "cuda/hot_latents.cuh"

namespace gemmascope_fast {

__device__ inline int64_t hot_entries(const HotLatents& p, int64_t latent) {
  const int64_t begin = p.feature_offsets[latent], end = p.feature_offsets[latent + 1];
  return (end < p.capacity ? end : p.capacity) - (begin > 0 ? begin : 0);
}

__device__ inline int hot_candidates(const HotLatents& p) {
  return p.state->candidates < p.most_candidates ? p.state->candidates : p.most_candidates;
}

__global__ void __launch_bounds__(kHotThreads) hot_candidates_kernel(HotLatents p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t latent = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       latent < p.d_sae; latent += step) {
    p.slots[latent] = -1;
    if (hot_entries(p, latent) < p.fewest) continue;
    const int at = atomicAdd(&p.state->candidates, 1);
    if (at < p.most_candidates) p.candidates[at] = static_cast<int32_t>(latent);
  }
}

// One thread per candidate.
__global__ void __launch_bounds__(kHotThreads) hot_rank_kernel(HotLatents p) {
  __shared__ int64_t entries[kHotThreads];
  __shared__ int32_t latents[kHotThreads];
  const int count = hot_candidates(p);
  const int first = static_cast<int>(blockIdx.x * blockDim.x);
  if (first >= count) return;
  const int own = first + static_cast<int>(threadIdx.x);
  const int32_t latent = own < count ? p.candidates[own] : 0;
  const int64_t mine = hot_entries(p, latent);
  int rank = 0;
  for (int from = 0; from < count; from += kHotThreads) {
    const int at = from + static_cast<int>(threadIdx.x);
    __syncthreads();
    if (at < count) {
      latents[threadIdx.x] = p.candidates[at];
      entries[threadIdx.x] = hot_entries(p, latents[threadIdx.x]);
    }
    __syncthreads();
    const int here = count - from < kHotThreads ? count - from : kHotThreads;
    for (int i = 0; i < here; ++i) {
      rank += entries[i] > mine || (entries[i] == mine && latents[i] < latent) ? 1 : 0;
    }
  }
  if (own >= count || rank >= p.most) return;
  p.latents[rank] = latent;
  p.slots[latent] = rank;
  atomicAdd(&p.state->entries, static_cast<unsigned long long>(mine));
}

// One warp, behind the others.
__global__ void __launch_bounds__(kWarp) hot_decide_kernel(HotLatents p) {
  if (threadIdx.x != 0) return;
  const int count = hot_candidates(p);
  const int rows = count < p.most ? count : p.most;
  const int tiles = (rows + kHotTile - 1) / kHotTile;
  const bool worth = static_cast<int64_t>(p.state->entries) >= p.worth[tiles];
  p.state->chosen = worth ? rows : 0;
}

}  // namespace gemmascope_fast
