// The dot product of two rows by one warp, for pre_at and d_values.
//
// 3 chunks of both rows are in flight per lane: 3 KB per warp in 16 bits, 72 KB per multiprocessor at 24 warps. Lanes
// are summed by a fixed tree.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {

constexpr int kPairWarps = 4;
constexpr int kPairThreads = kPairWarps * kWarp;
constexpr int kPairChunks = 3;

// The words of a lane's chunk at `col` of a wide row; the second is for float32 only.
__device__ inline void load_pair_chunk(const char* row, const Rows& m, int64_t col,
                                       uint4 (&raw)[2]) {
  const bool inside = col < m.cols, fp32 = m.dtype == kFloat32;
  const char* from = row + col * (fp32 ? 4 : 2);
  raw[0] = load_if(inside, from);
  raw[1] = load_if(inside && fp32, from + 16);
}

// Both rows are wide.
__device__ inline float wide_dot(const Rows& a, int64_t i, const Rows& b, int64_t j, int lane) {
  const char *a_row = chunk_address(a, i, 0), *b_row = chunk_address(b, j, 0);
  float acc = 0.0f;
  for (int64_t start = 0; start < a.cols; start += kPairChunks * kWarp * kChunk) {
    uint4 a_raw[kPairChunks][2], b_raw[kPairChunks][2];
#pragma unroll
    for (int u = 0; u < kPairChunks; ++u) {
      const int64_t col = start + (u * kWarp + lane) * kChunk;
      load_pair_chunk(a_row, a, col, a_raw[u]);
      load_pair_chunk(b_row, b, col, b_raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kPairChunks; ++u) {
      float v[kChunk], w[kChunk];
      widen_chunk(a_raw[u][0], a_raw[u][1], a.dtype, v);
      widen_chunk(b_raw[u][0], b_raw[u][1], b.dtype, w);
      acc = dot_chunk(v, w, acc);
    }
  }
  return acc;
}

// <a[i], b[j]>, the same in every lane.
__device__ inline float pair_dot(const Rows& a, int64_t i, const Rows& b, int64_t j, int lane) {
  if (a.wide && b.wide) return warp_sum(wide_dot(a, i, b, j, lane));
  float acc = 0.0f;
  for (int64_t col = lane * kChunk; col < a.cols; col += kWarp * kChunk) {
    float v[kChunk], w[kChunk];
    load_narrow(a, i, col, v);
    load_narrow(b, j, col, w);
    acc = dot_chunk(v, w, acc);
  }
  return warp_sum(acc);
}

// Grid for `pairs` pairs; the kernels loop over the rest.
inline unsigned pair_blocks(int64_t pairs) {
  const int64_t blocks = (pairs + kPairWarps - 1) / kPairWarps;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

}  // namespace gemmascope_fast
