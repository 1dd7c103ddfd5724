// The encoder of at most 16 tokens, 16-bit x and W: two strips of pre = x W^T + bias per block, and W is read once.
//
//   x [n, d], W [d_sae, d]; rows begin at multiples of 16 bytes and have a multiple of 16 bytes
//
// Algorithm: a block computes 16 tokens x 64 latents. Stages of 256 bytes of each row come by cp.async, zeros for
// tokens that are not there. Each of 8 warps takes 32 latents and a quarter of the stage's k. A lane reads 16 bytes of
// a row at once and hands 8 bytes to each of two mma.m16n8k16: they see k in another order than memory has, the same in
// both operands, and neither ldmatrix nor a shuffle is needed. The four sums of an element are added in order in shared
// memory, two warps emit a strip of 32 latents each (emit_strip.cuh). JumpReLU's limits are found here, while the first
// stages are on their way.
//
// Bound by the read of W, 2 d F bytes: d = 5376 and F = 65,536 are 705 MB, 0.147 ms at the 4.8 TB/s of an H200. Of x a
// block reads n / 64 of that from the L2. 2 n operations per element of W, 16 per byte for 16 tokens, are a tenth of
// what the tensor cores have time for. Three blocks keep 120 KiB on their way to a multiprocessor, 16 MB in all.
// A call of jumprelu_encode clears its counters and launches this, scan_few_kernel, limit_offsets_kernel (with max_nnz)
// and place_kernel.
#pragma once

#include "cuda/emit_strip.cuh"
#include "cuda/encode_limit.cuh"
#include "cuda/mma.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kFewLatents = 64;  // of a block
constexpr int kFewThreads = 256;
// That share a multiprocessor: its shared memory has room for one on 8.6, 8.9 and 12.0.
constexpr int kFewBlocks = kCapability == 86 || kCapability == 89 || kCapability >= 120 ? 1 : 3;
constexpr int kFewStages = 3;
constexpr int kFewRowBytes = 256;  // of a row in a stage
constexpr int kFewDepth = 4;       // warps that share k, 64 bytes of a row each
constexpr int kFewWidth = 32;      // latents of a warp, and of a strip
constexpr int kFewStrips = kFewLatents / kFewWidth;
constexpr int kFewStageBytes = (kStripTokens + kFewLatents) * kFewRowBytes;
constexpr int kFewShared =
    kFewStages * kFewStageBytes + 2 * kFewLatents * static_cast<int>(sizeof(float));

// Chunks of 16 bytes of odd rows have bit 2 of their position flipped: 8 lanes that load 4 chunks each of two rows find
// them in different banks.
__device__ __forceinline__ int few_offset(int row, int chunk) {
  return row * kFewRowBytes + (chunk ^ row % 2 * 4) * 16;
}

// What one thread copies of every stage: chunk threadIdx.x % 16 of a row of x, and of every 16th row of W.
template <typename T>
struct FewCopies {
  static constexpr int kW = kFewLatents / kStripTokens;
  static_assert(kFewThreads == kStripTokens * kFewRowBytes / 16, "a chunk of x per thread");
  const char* x;
  const char* W;
  int64_t W_step;
  uint32_t valid;  // rows inside: bit 0 of x, bit 1 + i of W
  int64_t k, d;    // in elements

  __device__ __forceinline__ FewCopies(const EncodeTiles& p, int64_t latent0) {
    const int64_t row = threadIdx.x / 16;
    k = threadIdx.x % 16 * (16 / static_cast<int>(sizeof(T)));
    d = p.d;
    valid = row < p.n ? 1 : 0;
    for (int i = 0; i < kW; ++i) {
      valid |= (latent0 + row + kStripTokens * i < p.last ? 2u : 0) << i;
    }
    x = static_cast<const char*>(p.x) + (row * p.x_stride + k) * sizeof(T);
    W = static_cast<const char*>(p.W) + ((latent0 + row) * p.W_stride + k) * sizeof(T);
    W_step = kStripTokens * p.W_stride * static_cast<int>(sizeof(T));
  }

  // Copies the next stage to `stage`; zeros outside the matrices.
  __device__ __forceinline__ void next(SharedAddress stage) {
    const SharedAddress to = stage + few_offset(threadIdx.x / 16, threadIdx.x % 16);
    const bool inside = k < d;
    copy_async(to, x, inside && (valid & 1));
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      copy_async(to + (i + 1) * kStripTokens * kFewRowBytes, W + i * W_step,
                 inside && (valid >> i & 2));
    }
    x += kFewRowBytes;
    W += kFewRowBytes;
    k += kFewRowBytes / static_cast<int>(sizeof(T));
  }
};

// acc += x W^T over the 32 elements of k that this warp has of a stage; `from` is the lane's chunk of a token's row.
template <typename T>
__device__ __forceinline__ void few_product(SharedAddress from, int first_latent,
                                            float (&acc)[kFewWidth / 8][4]) {
  uint32_t low[4], high[4];  // of the lane's two tokens
  load_words(low, from);
  load_words(high, from + 8 * kFewRowBytes);
  const uint32_t tokens[2][4] = {{low[0], high[0], low[1], high[1]},
                                 {low[2], high[2], low[3], high[3]}};
#pragma unroll
  for (int m = 0; m < kFewWidth / 8; ++m) {
    uint32_t latents[4];
    load_words(latents, from + (kStripTokens + first_latent + 8 * m) * kFewRowBytes);
    multiply_add<T>(acc[m], tokens[0], latents[0], latents[1]);
    multiply_add<T>(acc[m], tokens[1], latents[2], latents[3]);
  }
}

// Biases and limits of the block's latents, by a thread each.
template <Limit kLimit>
__device__ __forceinline__ void few_limits(const EncodeTiles& p, int64_t latent0, float* bias,
                                           float* limit) {
  if (threadIdx.x >= kFewLatents) return;
  const int64_t latent = latent0 + threadIdx.x;
  const bool inside = latent < p.last;
  const float add = inside ? p.bias[latent] : 0.0f;
  bias[threadIdx.x] = add;
  if (kLimit == Limit::kPerLatent) {
    limit[threadIdx.x] = inside ? encode_limit(add, p.threshold[latent], p.window) : 0.0f;
  }
}

// The sums of the warps that shared k, in their order: those of warp w's strip, w < 2. `parts`: 16 KiB that nobody
// reads any more.
__device__ __forceinline__ void add_parts(const float (&own)[kFewWidth / 8][4], float4* parts,
                                          float (&sums)[kFewWidth / 8][4]) {
  constexpr int kBlocks = kFewLatents / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int written = warp % kFewDepth * kBlocks + warp / kFewDepth * (kFewWidth / 8);
#pragma unroll
  for (int m = 0; m < kFewWidth / 8; ++m) {
    parts[(written + m) * 32 + lane] = make_float4(own[m][0], own[m][1], own[m][2], own[m][3]);
  }
  __syncthreads();
  if (warp >= kFewStrips) return;
#pragma unroll
  for (int m = 0; m < kFewWidth / 8; ++m) {
    const float4* part = parts + (warp * (kFewWidth / 8) + m) * 32 + lane;
    float4 sum = part[0];
#pragma unroll
    for (int i = 1; i < kFewDepth; ++i) {
      const float4 more = part[i * kBlocks * 32];
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    sums[m][0] = sum.x;
    sums[m][1] = sum.y;
    sums[m][2] = sum.z;
    sums[m][3] = sum.w;
  }
}

// Second pass: whether no strip of the block is to be computed again.
__device__ __forceinline__ bool few_is_complete(const EncodeTiles& p, int64_t column) {
  bool complete = true;
  for (int s = 0; s < kFewStrips; ++s) {
    const bool inside = p.first + (column + s) * kFewWidth < p.last;
    complete = complete && !(inside && strip_is_missing(p, 0, column + s));
  }
  return complete;
}

// The sums x W^T of latents latent0 .. + 63: those of warp w's strip, w < 2. `shared`: kFewShared bytes, whose last
// 2 kFewLatents floats stay as they are; meanwhile() is called while the first stages are on their way.
template <typename T, class Meanwhile>
__device__ __forceinline__ void few_sums(const EncodeTiles& p, int64_t latent0,
                                         unsigned char* shared, const Meanwhile& meanwhile,
                                         float (&sums)[kFewWidth / 8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SharedAddress stages = shared_address(shared);
  FewCopies<T> copies(p, latent0);
#pragma unroll
  for (int stage = 0; stage < kFewStages - 1; ++stage) {
    copies.next(stages + stage * kFewStageBytes);
    copy_async_commit();
  }
  meanwhile();
  const int own = few_offset(lane / 4, warp % kFewDepth * 4 + lane % 4);
  const int first_latent = warp / kFewDepth * kFewWidth;
  const int64_t steps = (p.d * static_cast<int64_t>(sizeof(T)) + kFewRowBytes - 1) / kFewRowBytes;
  float acc[kFewWidth / 8][4] = {};
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kFewStages - 2>();
    __syncthreads();  // the stage is complete for all, and nobody reads the one before any more
    copies.next(stages + (stage + kFewStages - 1) % kFewStages * kFewStageBytes);
    copy_async_commit();
    few_product<T>(stages + stage * kFewStageBytes + own, first_latent, acc);
    stage = (stage + 1) % kFewStages;
  }
  copy_async_wait<0>();
  __syncthreads();
  add_parts(acc, reinterpret_cast<float4*>(shared), sums);
}

// A block per 64 latents of [first, last); n <= 16. p.limit is not read.
template <typename T, Limit kLimit>
__global__ void __launch_bounds__(kFewThreads, kFewBlocks) encode_few_kernel(EncodeTiles p) {
  GSF_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kFewStrips;
  if (p.rest != nullptr && few_is_complete(p, column)) return;
  const int64_t latent0 = p.first + column * kFewWidth;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* bias = reinterpret_cast<float*>(shared + kFewStages * kFewStageBytes);
  float sums[kFewWidth / 8][4];
  few_sums<T>(
      p, latent0, shared, [&] { few_limits<kLimit>(p, latent0, bias, bias + kFewLatents); }, sums);
  if (warp >= kFewStrips) return;
  bias += warp * kFewWidth;
  emit_strip<kFewWidth, kLimit>(p, sums, 0, latent0 + warp * kFewWidth, column + warp, lane, bias,
                                bias + kFewLatents);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
