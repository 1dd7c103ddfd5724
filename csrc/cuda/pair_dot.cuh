// The dot product of two rows by one warp, for pre_at and d_values.
//
// 3 chunks of both rows are in flight per lane: 3 KB per warp in 16 bits, 72 KB per multiprocessor at 24 warps. Lanes are
// summed by a fixed tree.
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

// Grid for `pairs` pairs; the kernels loop over the rest.
inline unsigned pair_blocks(int64_t pairs) {
  const int64_t blocks = (pairs + kPairWarps - 1) / kPairWarps;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

}  // namespace gemmascope_fast
