// Device code that lays out the operands of the hot latents' products, in bfloat16.
//
//   g^T [d_out, n], x^T [d_in, n]      hot_transpose_kernel, which also finds rows that are not finite
//   W_hot [rows, d_out]                hot_gather_kernel
//   V, Q [rows, 2 n]                   hot_fill_kernel: values[e] and gradient[e] gate[e] at e's token, zeros elsewhere
//
// A coefficient is the sum of two bfloat16, in the first and in the second half of its row: 2^-17 of it is lost. With
// its gradients known, hot_fill_kernel also writes what the pass writes per entry and per latent.
// What a product would get wrong is handed back to the pass: a latent with a coefficient that is not finite or could
// overflow bfloat16, or with tokens that do not ascend (a repeated one is a sum).
// Bound by the bytes of the panels.
#pragma once

#include "cuda/feature_pass.cuh"
#include "cuda/hot_latents.cuh"

namespace gemmascope_fast {

constexpr int kHotSquare = 64;

struct HotTranspose {
  Rows from;       // [n, cols] bfloat16, wide
  uint16_t* to;    // [cols][tokens]
  int64_t tokens;  // hot_tokens(n)
  HotState* state;
};

__device__ inline bool all_finite_bf16(const uint4& raw) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    finite = finite && (word[i] & 0x7f80u) != 0x7f80u && (word[i] & 0x7f800000u) != 0x7f800000u;
  }
  return finite;
}

using HotSquare = uint32_t[kHotSquare][kHotSquare / 2 + 1];  // 64 x 64 bfloat16

// Column `col` of two rows.
__device__ inline uint32_t column_pair(const HotSquare& square, int row, int col) {
  const int shift = col % 2 * 16;
  return (square[row][col / 2] >> shift & 0xffffu) | (square[row + 1][col / 2] >> shift & 0xffffu)
                                                         << 16;
}

// 16 bytes at once: the compiler would store the words, which come from shared memory, one by one.
__device__ inline void store_whole(uint16_t* to, const uint4& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = v;
#endif
}

// One block per square of 64 tokens and 64 columns.
__global__ void __launch_bounds__(kHotThreads) hot_transpose_kernel(HotTranspose p) {
  constexpr int kSteps = kHotSquare * kHotSquare / kChunk / kHotThreads;
  constexpr int kChunks = kHotSquare / kChunk;
  __shared__ HotSquare square;
  if (p.state->chosen == 0) return;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kHotSquare;
  const int64_t col0 = static_cast<int64_t>(blockIdx.y) * kHotSquare;
  bool finite = true;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = step * kHotThreads + static_cast<int>(threadIdx.x);
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t col = col0 + chunk * kChunk;
    const bool inside = row0 + row < p.from.rows && col < p.from.cols;
    const uint4 raw =
        load_if(inside, chunk_address(p.from, inside ? row0 + row : 0, inside ? col : 0));
    finite = finite && all_finite_bf16(raw);
    uint32_t* to = square[row] + 4 * chunk;
    to[0] = raw.x;
    to[1] = raw.y;
    to[2] = raw.z;
    to[3] = raw.w;
  }
  if (!finite) p.state->broken = 1;
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = step * kHotThreads + static_cast<int>(threadIdx.x);
    const int col = i / kChunks, row = i % kChunks * kChunk;
    if (col0 + col >= p.from.cols) continue;
    uint16_t* to = p.to + (col0 + col) * p.tokens + row0 + row;
    const uint4 raw =
        make_uint4(column_pair(square, row, col), column_pair(square, row + 2, col),
                   column_pair(square, row + 4, col), column_pair(square, row + 6, col));
    store_whole(to, raw);
  }
}

struct HotGather {
  Rows from;     // [d_sae, cols] bfloat16, wide
  uint16_t* to;  // [most][cols]
  const int32_t* latents;
  const HotState* state;
};

// One block per row.
__global__ void __launch_bounds__(kHotThreads) hot_gather_kernel(HotGather p) {
  const int64_t row = blockIdx.x;
  if (row >= hot_rows(p.state)) return;
  const char* from = chunk_address(p.from, p.latents[row], 0);
  uint4* to = reinterpret_cast<uint4*>(p.to + row * p.from.cols);
  for (int64_t i = threadIdx.x; i < p.from.cols / kChunk; i += kHotThreads) {
    to[i] = load_if(true, from + i * 16);
  }
}

struct HotPanels {
  const float* dots;         // [most][tokens]: <W_dec[j], g[r]>
  uint16_t *values, *d_pre;  // [most][2 * tokens]: V, Q
  int64_t tokens;
  const int32_t* latents;
  int32_t* slots;
  const HotState* state;
};

// Both terms of a coefficient.
__device__ inline void place_coefficient(float value, uint16_t* row, int64_t tokens,
                                         int32_t token) {
  const uint32_t high = round_to_bits(value, kBFloat16);
  row[token] = static_cast<uint16_t>(high);
  row[tokens + token] =
      static_cast<uint16_t>(round_to_bits(value - bf16_bits_to_float(high), kBFloat16));
}

// Sum over the block by a fixed tree, in its first thread.
__device__ inline float hot_block_sum(float v, float* partial) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = v;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; threadIdx.x == 0 && warp < kHotThreads / kWarp; ++warp) sum += partial[warp];
  return sum;
}

// One block per row; of the pass only what concerns entries is used.
__global__ void __launch_bounds__(kHotThreads) hot_fill_kernel(FeaturePass p, HotPanels panels) {
  __shared__ float partial[kHotThreads / kWarp];
  const int64_t row = blockIdx.x;
  if (row >= hot_rows(panels.state)) return;
  const int64_t latent = panels.latents[row];
  int64_t begin = p.feature_offsets[latent], end = p.feature_offsets[latent + 1];
  if (begin < 0) begin = 0;
  if (end > p.capacity) end = p.capacity;
  uint16_t* values = panels.values + row * 2 * panels.tokens;
  uint16_t* d_pre = panels.d_pre + row * 2 * panels.tokens;
  for (int64_t i = threadIdx.x; i < 2 * panels.tokens / kChunk; i += kHotThreads) {
    reinterpret_cast<uint4*>(values)[i] = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint4*>(d_pre)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const float theta = p.d_threshold != nullptr ? p.threshold[latent] : 0.0f;
  float bias = 0.0f, window = 0.0f;
  bool odd = false;
  for (int64_t i = begin + threadIdx.x; i < end; i += kHotThreads) {
    const Record record = p.records[i];
    if (record.token < 0) continue;
    const float gradient = record.gradient + panels.dots[row * panels.tokens + record.token];
    const float own = gradient * record.gate;
    odd = odd || !(fabsf(record.value) < 1e38f) || !(fabsf(own) < 1e38f) ||
          (i > begin && p.records[i - 1].token >= record.token);
    place_coefficient(record.value, values, panels.tokens, record.token);
    place_coefficient(own, d_pre, panels.tokens, record.token);
    const int64_t e = p.permutation[i];
    if (p.d_pre != nullptr) p.d_pre[e] = own;
    bias += own;
    if (p.d_threshold == nullptr || !(record.gate == 0.0f || record.value < theta + p.half))
      continue;
    window += theta * gradient + (p.d_gate != nullptr ? p.d_gate[e] : 0.0f);
  }
  bias = hot_block_sum(bias, partial);
  window = hot_block_sum(window, partial);
  odd = __syncthreads_or(odd);
  if (threadIdx.x != 0) return;
  if (odd) panels.slots[latent] = -1;
  if (p.d_b_enc != nullptr) p.d_b_enc[latent] = bias;
  if (p.d_threshold != nullptr) p.d_threshold[latent] = window / -p.bandwidth;
}

}  // namespace gemmascope_fast
