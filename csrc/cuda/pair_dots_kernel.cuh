// Device code of pre_at and of decode_backward's d_values in token order: dot products of given pairs of rows.
//
//   pre[p] = <x[rows[p]], W[latents[p]]> + bias[latents[p]]
//   out[e] = <g[i], W[indices[e]]>      e in [offsets[i], offsets[i + 1])
//   W [F, d], x and g [n, d]
//
// One warp per pair, 3 chunks of both rows in flight per lane: 3 KB per warp in 16 bits, 72 KB per multiprocessor at 24
// warps. Neighbouring entries share g[i], which is read again from the L1. Lanes are summed by a fixed tree. Bound by
// reading a row of W per pair.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {

constexpr int kPairWarps = 4;
constexpr int kPairThreads = kPairWarps * kWarp;
constexpr int kPairChunks = 3;

// <a[i], b[j]>, the same in every lane.
__device__ inline float pair_dot(const Rows& a, int64_t i, const Rows& b, int64_t j, int lane) {
  const int a_dtype = chunk_dtype(a), b_dtype = chunk_dtype(b);
  float acc = 0.0f;
  for (int64_t start = 0; start < a.cols; start += kPairChunks * kWarp * kChunk) {
    uint4 a_raw[kPairChunks][2], b_raw[kPairChunks][2];
#pragma unroll
    for (int u = 0; u < kPairChunks; ++u) {
      const int64_t col = start + (u * kWarp + lane) * kChunk;
      a_raw[u][0] = a_raw[u][1] = b_raw[u][0] = b_raw[u][1] = make_uint4(0, 0, 0, 0);
      if (col < a.cols) {
        load_chunk(a, i, col, &a_raw[u][0], &a_raw[u][1]);
        load_chunk(b, j, col, &b_raw[u][0], &b_raw[u][1]);
      }
    }
#pragma unroll
    for (int u = 0; u < kPairChunks; ++u) {
      float v[kChunk], w[kChunk];
      widen_chunk(a_raw[u][0], a_raw[u][1], a_dtype, v);
      widen_chunk(b_raw[u][0], b_raw[u][1], b_dtype, w);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) acc = fmaf(v[k], w[k], acc);
    }
  }
  return warp_sum(acc);
}

struct PreAt {
  Rows x;                      // [n, d]
  Rows W;                      // [F, d]
  const float* bias;           // [F]
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

struct EntryDots {
  const int64_t* offsets;  // [n + 1]
  const int32_t* indices;  // [capacity]
  int64_t n, capacity;
  Rows W;      // [F, d]
  Rows g;      // [n, d]
  float* out;  // [capacity], 0 for padding and for indices out of range
};

// The last i < n with offsets[i] <= e.
__device__ inline int64_t row_of_entry(const int64_t* offsets, int64_t n, int64_t e) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (__ldg(offsets + middle) <= e) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

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
