// Device code of by_feature around the stable radix sort (CUB, by_feature.cu): its keys, segment bounds.
//
//   keys[e]             latent of entry e, or d_sae for padding and for latents out of range (they sort last)
//   feature_offsets[j]  first sorted position whose key is >= j
//   permutation[p]      entry at sorted position p, 0 from feature_offsets[d_sae] on
//
// The number of entries stays on the device: all `capacity` positions are sorted, and nothing waits for the host. CUB's
// radix sort is stable and touches ceil(log2(d_sae + 1)) key bits; it is bound by memory bandwidth, as are the kernels.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {

constexpr int kByFeatureThreads = 256;

struct ByFeature {
  const int64_t* offsets;  // [n + 1]
  const int32_t* indices;  // [capacity]
  int64_t n, capacity, d_sae;
  uint32_t* keys;            // [2][capacity] unsorted, sorted
  int64_t* positions;        // [capacity]    0, 1, 2, ...
  int64_t* feature_offsets;  // [d_sae + 1]
  int64_t* permutation;      // [capacity]
};

__global__ void __launch_bounds__(kByFeatureThreads) by_feature_keys_kernel(ByFeature p) {
  const int64_t nnz = p.offsets[p.n];
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < p.capacity;
       e += step) {
    const int64_t latent = e < nnz ? p.indices[e] : p.d_sae;
    const bool valid = latent >= 0 && latent < p.d_sae;
    p.keys[e] = static_cast<uint32_t>(valid ? latent : p.d_sae);
    p.positions[e] = e;
  }
}

// One thread per latent: a binary search costs log2(capacity) cached reads and no balancing.
__global__ void __launch_bounds__(kByFeatureThreads) by_feature_bounds_kernel(ByFeature p) {
  const uint32_t* sorted = p.keys + p.capacity;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; j <= p.d_sae;
       j += step) {
    int64_t low = 0, high = p.capacity;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sorted[middle] < static_cast<uint32_t>(j)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    p.feature_offsets[j] = low;
  }
}

__global__ void __launch_bounds__(kByFeatureThreads) by_feature_padding_kernel(ByFeature p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t begin = p.feature_offsets[p.d_sae];
  for (int64_t e = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       e < p.capacity; e += step) {
    p.permutation[e] = 0;
  }
}

// Grid for `size` items, one each, at most 2^20 blocks; the kernels loop over the rest.
inline unsigned by_feature_blocks(int64_t size) {
  const int64_t blocks = (size + kByFeatureThreads - 1) / kByFeatureThreads;
  return static_cast<unsigned>(blocks<1 ? 1 : blocks>(1 << 20) ? 1 << 20 : blocks);
}

// What the sort has to look at: keys are at most d_sae.
inline int by_feature_key_bits(int64_t d_sae) {
  int bits = 1;
  while (bits < 32 && (d_sae >> bits) != 0) ++bits;
  return bits;
}

}  // namespace gemmascope_fast
