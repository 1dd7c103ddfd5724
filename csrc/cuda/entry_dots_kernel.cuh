// Device code of decode_backward's d_values in token order: a dot product per entry, one warp each.
//
//   out[e] = <W[indices[e]], g[i]>      e in [offsets[i], offsets[i + 1]), W [F, d], g [n, d]
//
// Neighbouring entries share g[i], which is read again from the L1; the token of an entry is found by binary search in
// offsets, which lie there too. Bound by reading a row of W per entry.
#pragma once

#include "cuda/entry_row.cuh"
#include "cuda/pair_dot.cuh"

namespace gemmascope_fast {

struct EntryDots {
  const int64_t* offsets;  // [n + 1]
  const int32_t* indices;  // [capacity]
  int64_t n, capacity;
  Rows W;      // [F, d]
  Rows g;      // [n, d]
  float* out;  // [capacity], 0 for padding and for indices out of range
};

__global__ void __launch_bounds__(kPairThreads, 6) entry_dots_kernel(EntryDots p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPairWarps;
  const int64_t nnz = p.offsets[p.n];
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kPairWarps + threadIdx.x / kWarp;
       e < p.capacity; e += step) {
    const int32_t j = p.indices[e];
    float dot = 0.0f;
    if (e < nnz && p.n > 0 && j >= 0 && j < p.W.rows) {
      dot = pair_dot(p.W, j, p.g, row_of_entry(p.offsets, p.n, e), lane);
    }
    if (lane == 0) p.out[e] = dot;
  }
}

}  // namespace gemmascope_fast
