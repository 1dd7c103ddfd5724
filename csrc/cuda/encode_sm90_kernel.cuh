// The encoder's tiles on Hopper: pre = x W^T in the accumulators of wgmma, never in memory, and emit_strip at the end.
//
// A tile is 128 tokens x 256 latents. A persistent CTA has three warpgroups: in the first, one thread brings blocks of
// 64 columns of x and W through a ring of stages (tensor copies, 128-byte swizzle) and one warp brings the biases and
// limits of the tile to come; the other two multiply, 64 tokens x 256 latents each, and emit their strips. Nothing but
// the ring joins the groups: copies for the next tile arrive while a strip is emitted, and one group may emit while the
// other multiplies.
// Bound by the tensor cores, 2 n d F operations; at small d the emitting shows.
#pragma once

#include "cuda/emit_few.cuh"
#include "cuda/emit_strip.cuh"
#include "cuda/encode_tiles.cuh"
#include "cuda/sm90_ptx.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kSm90Tokens = 128;
constexpr int kSm90Latents = 256;
constexpr int kSm90RowBytes = 128;  // of a stage: a row of the swizzle
constexpr int kSm90Threads = 384;
constexpr int kSm90TokenBytes = kSm90Tokens * kSm90RowBytes;
constexpr int kSm90LatentBytes = kSm90Latents * kSm90RowBytes;
constexpr int kSm90StageBytes = kSm90TokenBytes + kSm90LatentBytes;
constexpr int kSm90Slots = 2;  // tiles whose biases and limits are held
constexpr int kSm90SlotFloats = 2 * kSm90Latents;
constexpr int kSm90Stages = 4;

// Columns of x and W in a stage.
template <typename T>
constexpr int kSm90Depth = kSm90RowBytes / static_cast<int>(sizeof(T));

// What the products of T are summed in.
template <typename T>
using Sm90Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

// Order of the tiles: `group` rows of tiles sweep the columns together, so that x of these rows and W of a few columns
// stay in L2. rows * columns < 2^31 and group <= rows.
struct Sm90Raster {
  uint32_t rows, columns, group;
};

struct Sm90Tile {
  uint32_t row, column;
};

__device__ __forceinline__ Sm90Tile sm90_tile(const Sm90Raster& raster, uint32_t index) {
  const uint32_t sweep = raster.group * raster.columns;
  const uint32_t top = index / sweep * raster.group;
  const uint32_t height = min(raster.group, raster.rows - top);
  const uint32_t inside = index % sweep;
  return {top + inside % height, inside / height};
}

// Second pass: whether a strip of this row and column missed its run. One warp; every role asks alike, so all skip the
// same tiles.
__device__ __forceinline__ bool sm90_is_missing(const EncodeTiles& p, const Sm90Tile& tile,
                                                int lane) {
  constexpr int kStrips = kSm90Tokens / kStripTokens;
  static_assert(kStrips <= 32);
  const int64_t token0 =
      static_cast<int64_t>(tile.row) * kSm90Tokens + static_cast<int64_t>(lane) * kStripTokens;
  const bool missing = lane < kStrips && token0 < p.n && strip_is_missing(p, token0, tile.column);
  return __any_sync(kWholeWarp, missing);
}

// Position in a ring of kSize places. A place's barriers complete one phase each time round; `phase` is its parity.
template <int kSize>
struct Sm90Ring {
  uint32_t place = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++place == kSize) {
      place = 0;
      phase ^= 1;
    }
  }
};

// A place is full when its data is there, and empty when all its readers are done. Who fills a place waits for the
// phase before (phase ^ 1): complete from the start the first time round.
struct Sm90Barriers {
  uint64_t full[kSm90Stages];   // one arrival, and the bytes of a stage
  uint64_t empty[kSm90Stages];  // each multiplying warp
  uint64_t ready[kSm90Slots];   // each lane of the warp that brings the slot
  uint64_t unused[kSm90Slots];  // each multiplying warp of the CTA
};

// Dynamic shared memory: 4 stages of 48 KiB on a boundary of 1 KiB, slots of 4 KiB, barriers; a CTA may have 227 KiB.
struct Sm90Shared {
  unsigned char stages[kSm90Stages][kSm90StageBytes];
  float slots[kSm90Slots][kSm90SlotFloats];
  Sm90Barriers barriers;
};
constexpr int kSm90SharedBytes = 1024 + sizeof(Sm90Shared);

// What all roles know of their CTA.
struct Sm90Place {
  Sm90Shared* shared;
  uint32_t first, step, tiles;  // the CTA takes tiles first, first + step, ...
  int warp, lane;

  __device__ __forceinline__ uint32_t stage(uint32_t place) const {
    return sm90::shared_address(shared) + place * kSm90StageBytes;
  }
  __device__ __forceinline__ uint32_t full(uint32_t place) const {
    return sm90::shared_address(&shared->barriers.full[place]);
  }
  __device__ __forceinline__ uint32_t empty(uint32_t place) const {
    return sm90::shared_address(&shared->barriers.empty[place]);
  }
  __device__ __forceinline__ uint32_t ready(uint32_t place) const {
    return sm90::shared_address(&shared->barriers.ready[place]);
  }
  __device__ __forceinline__ uint32_t unused(uint32_t place) const {
    return sm90::shared_address(&shared->barriers.unused[place]);
  }
};

// One warp, of which one lane works: brings the stages.
template <typename T>
__device__ __forceinline__ void sm90_bring_stages(const Sm90Place& at, const CUtensorMap* x,
                                                  const CUtensorMap* W, const EncodeTiles& p,
                                                  const Sm90Raster& raster) {
  const int blocks = static_cast<int>((p.d + kSm90Depth<T> - 1) / kSm90Depth<T>);
  Sm90Ring<kSm90Stages> ring;
  for (uint32_t index = at.first; index < at.tiles; index += at.step) {
    const Sm90Tile tile = sm90_tile(raster, index);
    if (p.rest != nullptr && !sm90_is_missing(p, tile, at.lane)) continue;
    if (at.lane == 0) {
      const int32_t token = static_cast<int32_t>(tile.row * kSm90Tokens);
      const int32_t latent = static_cast<int32_t>(p.first + tile.column * kSm90Latents);
      for (int block = 0; block < blocks; ++block) {
        const uint32_t full = at.full(ring.place);
        const uint32_t stage = at.stage(ring.place);
        sm90::barrier_wait(at.empty(ring.place), ring.phase ^ 1);
        sm90::barrier_arrive_expecting(full, kSm90StageBytes);
        sm90::copy_box(x, stage, full, block * kSm90Depth<T>, token);
        sm90::copy_box(W, stage + kSm90TokenBytes, full, block * kSm90Depth<T>, latent);
        ring.advance();
      }
    }
    __syncwarp();
  }
}

// One warp: brings the biases and limits.
template <Limit kLimit>
__device__ __forceinline__ void sm90_bring_slots(const Sm90Place& at, const EncodeTiles& p,
                                                 const Sm90Raster& raster) {
  Sm90Ring<kSm90Slots> ring;
  for (uint32_t index = at.first; index < at.tiles; index += at.step) {
    const Sm90Tile tile = sm90_tile(raster, index);
    if (p.rest != nullptr && !sm90_is_missing(p, tile, at.lane)) continue;
    const int64_t latent0 = p.first + static_cast<int64_t>(tile.column) * kSm90Latents;
    float bias[kSm90Latents / 32], limit[kSm90Latents / 32];
#pragma unroll
    for (int i = 0; i < kSm90Latents / 32; ++i) {
      const int64_t latent = latent0 + 32 * i + at.lane;
      const bool inside = latent < p.last;
      bias[i] = kLimit != Limit::kScreened && inside ? p.bias[latent] : 0.0f;
      limit[i] = kLimit != Limit::kPerToken && inside ? p.limit[latent] : 0.0f;
    }
    sm90::barrier_wait(at.unused(ring.place), ring.phase ^ 1);
    float* slot = at.shared->slots[ring.place];
#pragma unroll
    for (int i = 0; i < kSm90Latents / 32; ++i) {
      slot[32 * i + at.lane] = bias[i];
      if (kLimit != Limit::kPerToken) slot[kSm90Latents + 32 * i + at.lane] = limit[i];
    }
    sm90::barrier_arrive(at.ready(ring.place));
    ring.advance();
  }
}

// This warp reads the stage no more.
__device__ __forceinline__ void sm90_release(const Sm90Place& at, uint32_t place) {
  if (at.lane == 0) sm90::barrier_arrive(at.empty(place));
}

// A warpgroup: acc = 64 tokens x 256 latents of the next `blocks` stages. A stage is released once the products that
// read it are done, while those of the next one run.
template <typename T>
__device__ __forceinline__ void sm90_multiply(const Sm90Place& at, int group, int blocks,
                                              Sm90Ring<kSm90Stages>& ring,
                                              Sm90Sum<T> (&acc)[32][4]) {
  constexpr bool kBytes = std::is_same_v<T, int8_t>;
  uint32_t before = 0;
  if constexpr (kBytes) {
#pragma unroll
    for (int j = 0; j < 32; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] = kSumZero;
    }
  }
  sm90::pin(acc);
  for (int block = 0; block < blocks; ++block) {
    const uint32_t stage = at.stage(ring.place);
    const uint64_t a = sm90::descriptor(stage + group * (kSm90TokenBytes / 2));
    const uint64_t b = sm90::descriptor(stage + kSm90TokenBytes);
    sm90::barrier_wait(at.full(ring.place), ring.phase);
    sm90::product_fence();
#pragma unroll
    for (int k = 0; k < kSm90RowBytes / 32; ++k) {
      sm90::product<T>(acc, a + 2 * k, b + 2 * k, kBytes || block > 0 || k > 0);
    }
    sm90::product_commit();
    if (block > 0) {
      sm90::product_wait<1>();
      sm90_release(at, before);
    }
    before = ring.place;
    ring.advance();
  }
  sm90::product_wait<0>();
  sm90::pin(acc);
  sm90_release(at, before);
}

// The sums as floats, in the same registers.
__device__ __forceinline__ const float (&sm90_floats(const float (&acc)[32][4]))[32][4] {
  return acc;
}
__device__ __forceinline__ const float (&sm90_floats(const int32_t (&acc)[32][4]))[32][4] {
  return reinterpret_cast<const float (&)[32][4]>(acc);
}

// A warpgroup: products and strips.
template <typename T, Limit kLimit>
__device__ __forceinline__ void sm90_consume(const Sm90Place& at, const EncodeTiles& p,
                                             const Sm90Raster& raster) {
  const int group = at.warp / 4 - 1;
  const int blocks = static_cast<int>((p.d + kSm90Depth<T> - 1) / kSm90Depth<T>);
  Sm90Ring<kSm90Stages> ring;
  Sm90Ring<kSm90Slots> slots;
  Sm90Sum<T> acc[32][4];
  for (uint32_t index = at.first; index < at.tiles; index += at.step) {
    const Sm90Tile tile = sm90_tile(raster, index);
    if (p.rest != nullptr && !sm90_is_missing(p, tile, at.lane)) continue;
    sm90_multiply<T>(at, group, blocks, ring, acc);
    const int64_t token0 = static_cast<int64_t>(tile.row) * kSm90Tokens + 16 * (at.warp - 4);
    const int64_t latent0 = p.first + static_cast<int64_t>(tile.column) * kSm90Latents;
    const float* slot = at.shared->slots[slots.place];
    sm90::barrier_wait(at.ready(slots.place), slots.phase);
    emit_strip_of_few<kSm90Latents, kLimit>(p, sm90_floats(acc), token0, latent0, tile.column,
                                            at.lane, slot, slot + kSm90Latents);
    __syncwarp();
    if (at.lane == 0) sm90::barrier_arrive(at.unused(slots.place));
    slots.advance();
  }
}

__device__ __forceinline__ void sm90_start(const Sm90Place& at, const CUtensorMap* x,
                                           const CUtensorMap* W) {
  if (threadIdx.x == 0) {
    sm90::prefetch_map(x);
    sm90::prefetch_map(W);
    for (int i = 0; i < kSm90Stages; ++i) {
      sm90::barrier_init(at.full(i), 1);
      sm90::barrier_init(at.empty(i), 8);
    }
    for (int i = 0; i < kSm90Slots; ++i) {
      sm90::barrier_init(at.ready(i), 32);
      sm90::barrier_init(at.unused(i), 8);
    }
    sm90::barrier_init_fence();
  }
  __syncthreads();
}

// 384 threads; dynamic shared memory of kSm90SharedBytes. The boxes are kSm90Depth x 128
// of x and kSm90Depth x 256 of W. Compiled for another architecture it is a trap of a few registers, which
// tells the host.
template <typename T, Limit kLimit>
__global__ void __launch_bounds__(kSm90Threads, 1)
    encode_sm90_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap W,
                       const __grid_constant__ EncodeTiles p,
                       const __grid_constant__ Sm90Raster raster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  unsigned char* given = sm90::dynamic_shared();
  given += (1024 - sm90::shared_address(given) % 1024) % 1024;
  Sm90Place at;
  at.shared = reinterpret_cast<Sm90Shared*>(given);
  at.first = blockIdx.x;
  at.step = gridDim.x;
  at.tiles = raster.rows * raster.columns;
  at.warp = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x / 32), 0);
  at.lane = threadIdx.x % 32;
  sm90_start(at, &x, &W);
  // 128 * 40 + 256 * 232 registers of the SM's 65536.
  if (at.warp < 4) {
    sm90::registers_shrink<40>();
    if (at.warp == 0) sm90_bring_stages<T>(at, &x, &W, p, raster);
    if (at.warp == 1) sm90_bring_slots<kLimit>(at, p, raster);
  } else {
    sm90::registers_grow<232>();
    sm90_consume<T, kLimit>(at, p, raster);
  }
#else
  __trap();
#endif
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
