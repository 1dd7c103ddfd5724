// The portable encoder (compute capability 8.0 and up): one tile of pre = x W^T + bias per block, selected in its
// epilogue.
//
//   x [n, d], W [d_sae, d]; rows begin at multiples of 16 bytes and have a multiple of 16 bytes
//
// Algorithm: a block computes 128 tokens x 256 latents, or 32 x 64 where there are no more tokens (SmallTile: W is read
// once, and many blocks are in flight). Stages of 64 bytes of each row come by cp.async; the 16-byte chunks of a row
// are permuted by (row / 2) % 4, so that neither the copies nor the loads conflict. A warp holds two strips for
// emit_strip.cuh. 16-bit elements go through mma.m16n8k16, float32 through FMA in the same layout, which keeps IEEE
// float32 and the order of k. Bound by the matrix units; float32 by FMA; few tokens by the read of W.
#pragma once

#include "cuda/emit_strip.cuh"
#include "cuda/mma.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kRowBytes = 64;  // of a row in a stage
constexpr int kTileGroup =
    16;  // row blocks that sweep the latents together and share W in the L2 cache

template <int kTokens_, int kLatents_, int kWarps_, int kAcross, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kTokens = kTokens_, kLatents = kLatents_;
  static constexpr int kThreads = 32 * kWarps_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;           // that share a multiprocessor
  static constexpr int kColumns = kAcross;           // warps side by side, a strip's width each
  static constexpr int kWidth = kLatents / kAcross;  // latents of a strip
  static constexpr int kWarpTokens = kTokens * kAcross / kWarps_;
  static constexpr int kStrips = kWarpTokens / kStripTokens;  // of a warp
  static constexpr int kStageBytes = (kTokens + kLatents) * kRowBytes;
  static constexpr int kShared =
      kStages * kStageBytes + 2 * kLatents * static_cast<int>(sizeof(float));
  using Sums = float[kStrips][kWidth / 8][4];
};
using LargeTile = TileShape<128, 256, 8, 2, 4, 1>;  // 98 KiB: the most of compute capability 8.6
using SmallTile = TileShape<32, 64, 4, 4, 8, 4>;

struct TileOrigin {
  int64_t token, latent, column;  // column: of the tile, counted in tiles
};

template <class Shape>
__host__ __device__ inline int64_t tile_rows(const EncodeTiles& p) {
  return (p.n + Shape::kTokens - 1) / Shape::kTokens;
}
template <class Shape>
__host__ __device__ inline int64_t tile_columns(const EncodeTiles& p) {
  return (p.last - p.first + Shape::kLatents - 1) / Shape::kLatents;
}

template <class Shape>
__device__ __forceinline__ TileOrigin tile_origin(const EncodeTiles& p, int64_t index) {
  const int64_t group = kTileGroup * tile_columns<Shape>(p), first = index / group * kTileGroup;
  const int64_t left = tile_rows<Shape>(p) - first, height = left < kTileGroup ? left : kTileGroup;
  const int64_t inside = index % group, column = inside / height;
  return {(first + inside % height) * Shape::kTokens, p.first + column * Shape::kLatents, column};
}

// What one thread copies of every stage: chunk threadIdx.x % 4 of rows threadIdx.x / 4 + kStep i, kX of x and kW of W.
template <typename T, class Shape>
struct TileCopies {
  static constexpr int kStep = Shape::kThreads / 4;
  static constexpr int kX = Shape::kTokens / kStep, kW = Shape::kLatents / kStep;
  static_assert(kStep % 8 == 0 && Shape::kTokens % kStep == 0 && Shape::kLatents % kStep == 0,
                "rows of one thread have one permutation");
  const char* x;
  const char* W;
  int64_t x_step, W_step;
  uint32_t valid;  // rows inside: bit i of x, bit kX + i of W
  int64_t k, d;    // in elements

  __device__ __forceinline__ TileCopies(const EncodeTiles& p, const TileOrigin& tile) {
    const int64_t row = threadIdx.x / 4;
    k = threadIdx.x % 4 * (16 / static_cast<int>(sizeof(T)));
    d = p.d;
    valid = 0;
    for (int i = 0; i < kX; ++i) valid |= (tile.token + row + kStep * i < p.n ? 1u : 0) << i;
    for (int i = 0; i < kW; ++i) {
      valid |= (tile.latent + row + kStep * i < p.last ? 1u : 0) << (kX + i);
    }
    x = static_cast<const char*>(p.x) + ((tile.token + row) * p.x_stride + k) * sizeof(T);
    W = static_cast<const char*>(p.W) + ((tile.latent + row) * p.W_stride + k) * sizeof(T);
    x_step = kStep * p.x_stride * static_cast<int>(sizeof(T));
    W_step = kStep * p.W_stride * static_cast<int>(sizeof(T));
  }

  // Copies the next stage to `stage`; zeros outside the matrices.
  __device__ __forceinline__ void next(SharedAddress stage) {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4 ^ (row / 2) % 4;
    const SharedAddress to = stage + row * kRowBytes + chunk * 16;
    const bool inside = k < d;
#pragma unroll
    for (int i = 0; i < kX; ++i) {
      copy_async(to + i * kStep * kRowBytes, x + i * x_step, inside && (valid >> i & 1));
    }
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      copy_async(to + (Shape::kTokens + i * kStep) * kRowBytes, W + i * W_step,
                 inside && (valid >> (kX + i) & 1));
    }
    x += kRowBytes;
    W += kRowBytes;
    k += kRowBytes / static_cast<int>(sizeof(T));
  }
};

// acc += x W^T over the 64 bytes of each row in a stage, 16-bit elements: two steps of 16.
template <typename T, class Shape>
struct TileProduct {
  SharedAddress a, b;  // this lane's row of the matrices that it names to load_matrices
  int a_chunk, b_chunk, a_swizzle, b_swizzle;

  __device__ __forceinline__ TileProduct(SharedAddress shared, int warp, int lane) {
    const int a_row = warp / Shape::kColumns * Shape::kWarpTokens + lane % 16;
    const int b_row =
        Shape::kTokens + warp % Shape::kColumns * Shape::kWidth + lane % 8 + lane / 16 * 8;
    a = shared + a_row * kRowBytes;
    b = shared + b_row * kRowBytes;
    a_chunk = lane / 16;
    b_chunk = lane / 8 % 2;
    a_swizzle = a_row / 2 % 4;
    b_swizzle = b_row / 2 % 4;
  }

  __device__ __forceinline__ void add(typename Shape::Sums& acc, int stage) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const SharedAddress from =
          b + stage * Shape::kStageBytes + ((2 * step + b_chunk) ^ b_swizzle) * 16;
      uint32_t tokens[Shape::kStrips][4];
#pragma unroll
      for (int s = 0; s < Shape::kStrips; ++s) {
        load_matrices(tokens[s], a + stage * Shape::kStageBytes + s * kStripTokens * kRowBytes +
                                     ((2 * step + a_chunk) ^ a_swizzle) * 16);
      }
#pragma unroll
      for (int m = 0; m < Shape::kWidth / 8; m += 2) {
        uint32_t latents[4];
        load_matrices(latents, from + m * 8 * kRowBytes);
#pragma unroll
        for (int s = 0; s < Shape::kStrips; ++s) {
          multiply_add<T>(acc[s][m], tokens[s], latents[0], latents[1]);
          multiply_add<T>(acc[s][m + 1], tokens[s], latents[2], latents[3]);
        }
      }
    }
  }
};

// The same for float32: the thread's elements, 4 of k at a time.
template <class Shape>
struct TileProduct<float, Shape> {
  SharedAddress a, b;
  int a_swizzle, b_swizzle;

  __device__ __forceinline__ TileProduct(SharedAddress shared, int warp, int lane) {
    const int a_row = warp / Shape::kColumns * Shape::kWarpTokens + lane / 4;
    const int b_row = Shape::kTokens + warp % Shape::kColumns * Shape::kWidth + 2 * (lane % 4);
    a = shared + a_row * kRowBytes;
    b = shared + b_row * kRowBytes;
    a_swizzle = a_row / 2 % 4;  // that of the rows 8, 16, 24 below as well
    b_swizzle = b_row / 2 % 4;  // that of the row below and of those 8 m below
  }

  __device__ __forceinline__ void add(typename Shape::Sums& acc, int stage) const {
#pragma unroll 1
    for (int chunk = 0; chunk < 4; ++chunk) {
      const SharedAddress a_from = a + stage * Shape::kStageBytes + (chunk ^ a_swizzle) * 16;
      const SharedAddress b_from = b + stage * Shape::kStageBytes + (chunk ^ b_swizzle) * 16;
      float4 token[2 * Shape::kStrips];
#pragma unroll
      for (int h = 0; h < 2 * Shape::kStrips; ++h)
        token[h] = load_shared(a_from + h * 8 * kRowBytes);
#pragma unroll
      for (int c = 0; c < Shape::kWidth / 4; ++c) {
        const float4 latent = load_shared(b_from + (c / 2 * 8 + c % 2) * kRowBytes);
#pragma unroll
        for (int h = 0; h < 2 * Shape::kStrips; ++h) {
          float& sum = acc[h / 2][c / 2][h % 2 * 2 + c % 2];
          sum = fmaf(token[h].x, latent.x, sum);
          sum = fmaf(token[h].y, latent.y, sum);
          sum = fmaf(token[h].z, latent.z, sum);
          sum = fmaf(token[h].w, latent.w, sum);
        }
      }
    }
  }
};

template <typename T, class Shape>
__device__ __forceinline__ void multiply_tile(const EncodeTiles& p, const TileOrigin& tile,
                                              SharedAddress stages, typename Shape::Sums& acc) {
  constexpr int kStages = Shape::kStages;
  TileCopies<T, Shape> copies(p, tile);
  const TileProduct<T, Shape> product(stages, threadIdx.x / 32, threadIdx.x % 32);
  const int64_t steps = (p.d * static_cast<int64_t>(sizeof(T)) + kRowBytes - 1) / kRowBytes;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    copies.next(stages + stage * Shape::kStageBytes);
    copy_async_commit();
  }
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage is complete for all, and nobody reads the one before any more
    copies.next(stages + (stage + kStages - 1) % kStages * Shape::kStageBytes);
    copy_async_commit();
    product.add(acc, stage);
    stage = (stage + 1) % kStages;
  }
  copy_async_wait<0>();
}

// Whether no strip of the tile is to be computed again. Called by all threads.
template <class Shape>
__device__ __forceinline__ bool tile_is_complete(const EncodeTiles& p, const TileOrigin& tile) {
  constexpr int kAcross = Shape::kColumns;
  bool missing = false;
  if (threadIdx.x < Shape::kTokens / kStripTokens * kAcross) {
    const int64_t token = tile.token + threadIdx.x / kAcross * kStripTokens;
    const int64_t latent = tile.latent + threadIdx.x % kAcross * Shape::kWidth;
    missing = token < p.n && latent < p.last &&
              strip_is_missing(p, token, tile.column * kAcross + threadIdx.x % kAcross);
  }
  return __syncthreads_or(missing) == 0;
}

template <typename T, Limit kLimit, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    encode_tile_kernel(EncodeTiles p) {
  GSF_DYNAMIC_SHARED(unsigned char, shared);
  const TileOrigin tile = tile_origin<Shape>(p, blockIdx.x);
  if (p.rest != nullptr && tile_is_complete<Shape>(p, tile)) return;
  float* bias = reinterpret_cast<float*>(shared + Shape::kStages * Shape::kStageBytes);
  float* limit = bias + Shape::kLatents;
  static_assert(Shape::kLatents <= Shape::kThreads, "a thread per latent");
  if (threadIdx.x < Shape::kLatents) {
    const int64_t latent = tile.latent + threadIdx.x;
    bias[threadIdx.x] = latent < p.last ? p.bias[latent] : 0.0f;
    if (kLimit == Limit::kPerLatent) {
      limit[threadIdx.x] = latent < p.last ? p.limit[latent] : 0.0f;
    }
  }
  typename Shape::Sums acc;
#pragma unroll
  for (int i = 0; i < Shape::kStrips * Shape::kWidth / 2; ++i) {
    acc[i / (Shape::kWidth / 2)][i / 4 % (Shape::kWidth / 8)][i % 4] = 0.0f;
  }
  multiply_tile<T, Shape>(p, tile, shared_address(shared), acc);
  __syncthreads();  // bias and limit, where there was no step
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, across = warp % Shape::kColumns;
  const int64_t token = tile.token + warp / Shape::kColumns * Shape::kWarpTokens;
#pragma unroll
  for (int s = 0; s < Shape::kStrips; ++s) {
    emit_strip<Shape::kWidth, kLimit>(
        p, acc[s], token + s * kStripTokens, tile.latent + across * Shape::kWidth,
        tile.column * Shape::kColumns + across, lane, bias + across * Shape::kWidth,
        limit + across * Shape::kWidth);
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
