// Products of the hot latents on Hopper: the tiles and the ring of encode_sm90_kernel.cuh, sums stored as they are.
//
//   dots [rows, n] = W_hot g^T                                  float32
//   d_W_dec[latents] = V g,   d_W_enc[latents] = Q x            bfloat16, of both terms of V and Q
//
// Both operands are K-major. The rows are those that hot_decide_kernel chose: how many tiles there are is read here.
// Bound by the tensor cores.
#pragma once

#include "cuda/encode_sm90_kernel.cuh"
#include "cuda/hot_latents.cuh"

namespace gemmascope_fast {

static_assert(kHotTile == kSm90Tokens);

struct HotProduct {
  const HotState* state;
  const int32_t* latents;
  int64_t columns;  // of the result
  int64_t depth;    // columns of the right operand
  int64_t second;   // where the second term of the left operand begins
  float* dots;      // [most][stride], or
  uint16_t* rows;   // [d_sae][stride]
  int64_t stride;
};

// One warp, of which one lane works: brings the stages, the terms of a block one after the other.
template <int kTerms>
__device__ __forceinline__ void hot_bring_stages(const Sm90Place& at, const CUtensorMap* left,
                                                 const CUtensorMap* right, const HotProduct& p,
                                                 const Sm90Raster& raster) {
  constexpr int kDepth = kSm90Depth<__nv_bfloat16>;
  if (at.lane != 0) return;
  const int blocks = static_cast<int>((p.depth + kDepth - 1) / kDepth);
  Sm90Ring<kSm90Stages> ring;
  for (uint32_t index = at.first; index < at.tiles; index += at.step) {
    const Sm90Tile tile = sm90_tile(raster, index);
    const int32_t row = static_cast<int32_t>(tile.row * kSm90Tokens);
    const int32_t column = static_cast<int32_t>(tile.column * kSm90Latents);
    for (int block = 0; block < kTerms * blocks; ++block) {
      const int32_t k = block / kTerms * kDepth;
      const int32_t term = block % kTerms * static_cast<int32_t>(p.second);
      const uint32_t full = at.full(ring.place);
      const uint32_t stage = at.stage(ring.place);
      sm90::barrier_wait(at.empty(ring.place), ring.phase ^ 1);
      sm90::barrier_arrive_expecting(full, kSm90StageBytes);
      sm90::copy_box(left, stage, full, k + term, row);
      sm90::copy_box(right, stage + kSm90TokenBytes, full, k, column);
      ring.advance();
    }
  }
}

// A warp's 16 rows of a tile. Columns come in pairs: those of float32 rows beyond the last are padding.
template <int kTerms>
__device__ __forceinline__ void hot_store(const HotProduct& p, const float (&acc)[32][4], int row0,
                                          int rows, int64_t column0, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    if (row >= rows) continue;
    const int64_t begin = (kTerms == 1 ? row : p.latents[row]) * p.stride;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const int64_t column = column0 + 8 * j + 2 * (lane % 4);
      if (column >= p.columns) continue;
      const float first = acc[j][2 * half], second = acc[j][2 * half + 1];
      if constexpr (kTerms == 1) {
        *reinterpret_cast<float2*>(p.dots + begin + column) = make_float2(first, second);
      } else {
        *reinterpret_cast<uint32_t*>(p.rows + begin + column) =
            round_to_bits(first, kBFloat16) | round_to_bits(second, kBFloat16) << 16;
      }
    }
  }
}

// A warpgroup.
template <int kTerms>
__device__ __forceinline__ void hot_consume(const Sm90Place& at, const HotProduct& p, int rows,
                                            const Sm90Raster& raster) {
  constexpr int kDepth = kSm90Depth<__nv_bfloat16>;
  const int blocks = kTerms * static_cast<int>((p.depth + kDepth - 1) / kDepth);
  Sm90Ring<kSm90Stages> ring;
  float acc[32][4];
  for (uint32_t index = at.first; index < at.tiles; index += at.step) {
    const Sm90Tile tile = sm90_tile(raster, index);
    sm90_multiply<__nv_bfloat16>(at, at.warp / 4 - 1, blocks, ring, acc);
    hot_store<kTerms>(p, acc, static_cast<int>(tile.row * kSm90Tokens) + 16 * (at.warp - 4), rows,
                      static_cast<int64_t>(tile.column) * kSm90Latents, at.lane);
  }
}

// 384 threads; dynamic shared memory of kSm90SharedBytes. The boxes are 64 x 128 of `left` and 64 x 256 of `right`.
// Compiled for another architecture it is a trap of a few registers, which tells the host.
template <int kTerms>
__global__ void __launch_bounds__(kSm90Threads, 1)
    hot_product_kernel(const __grid_constant__ CUtensorMap left,
                       const __grid_constant__ CUtensorMap right,
                       const __grid_constant__ HotProduct p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  const int rows = hot_rows(p.state);
  if (rows == 0) return;
  Sm90Raster raster;
  raster.rows = raster.group = static_cast<uint32_t>((rows + kHotTile - 1) / kHotTile);
  raster.columns = static_cast<uint32_t>((p.columns + kSm90Latents - 1) / kSm90Latents);
  unsigned char* given = sm90::dynamic_shared();
  given += (1024 - sm90::shared_address(given) % 1024) % 1024;
  Sm90Place at;
  at.shared = reinterpret_cast<Sm90Shared*>(given);
  at.first = blockIdx.x;
  at.step = gridDim.x;
  at.tiles = raster.rows * raster.columns;
  at.warp = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x / 32), 0);
  at.lane = threadIdx.x % 32;
  sm90_start(at, &left, &right);
  if (at.warp < 4) {
    sm90::registers_shrink<40>();
    if (at.warp == 0) hot_bring_stages<kTerms>(at, &left, &right, p, raster);
  } else {
    sm90::registers_grow<232>();
    hot_consume<kTerms>(at, p, rows, raster);
  }
#else
  __trap();
#endif
}

}  // namespace gemmascope_fast
