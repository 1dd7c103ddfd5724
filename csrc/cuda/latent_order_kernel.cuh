// Device code that sorts what the feature-major pass reads of each entry by latent.
//
//   records[p] = row, value, gate and d_values of entry permutation[p]
//
// Gathered once here, the records of a latent are contiguous there, one dependent load less before each row. Bound by
// 40 bytes per entry and the latency of log2(m) cached loads.
#pragma once

#include "cuda/entry_row.cuh"
#include "cuda/feature_pass.cuh"

namespace gemmascope_fast {

constexpr int kOrderThreads = 256;

struct LatentOrder {
  const int64_t* offsets;                 // [m + 1]
  const int64_t* feature_offsets;         // [d_sae + 1]
  const int64_t* permutation;             // [capacity]
  const float *values, *gate, *d_values;  // [capacity], null for zeros
  int64_t m, d_sae, capacity;
  Record* records;  // [capacity]
};

__device__ inline float number_at(const float* source, int64_t e) {
  return source != nullptr ? source[e] : 0.0f;
}

__global__ void __launch_bounds__(kOrderThreads) latent_order_kernel(LatentOrder p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t nnz = p.offsets[p.m], stored = p.feature_offsets[p.d_sae];
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < p.capacity;
       at += step) {
    Record record = {-1, 0.0f, 0.0f, 0.0f};
    const int64_t e = at < stored ? p.permutation[at] : -1;
    if (e >= 0 && e < nnz && e < p.capacity) {
      record.token = static_cast<int32_t>(row_of_entry(p.offsets, p.m, e));
      record.value = number_at(p.values, e);
      record.gate = number_at(p.gate, e);
      record.gradient = number_at(p.d_values, e);
    }
    p.records[at] = record;
  }
}

}  // namespace gemmascope_fast
