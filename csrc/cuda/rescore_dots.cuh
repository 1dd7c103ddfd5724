// The float32 sums that decide in the screened encoders: a row of x in shared memory, two latents to a warp at a time.
//
// A lane sums the chunks 32 apart in order, and the lanes are added by a fixed tree: a value depends on its row and its
// latent alone. Bound by memory: a candidate reads its row of W, 2 d bytes; 8 words of 16 bytes are in flight per lane.
#pragma once

#include "cuda/device.cuh"
#include "cuda/screened_rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kRescoreThreads = 256;
constexpr int kRescoreWarps = kRescoreThreads / kWarp;
constexpr int kRescoreAhead = 4;  // words in flight, of each of two candidates

// Elements of W in a word, and words of x in shared memory: d in whole rounds of all lanes, zeros behind d.
template <bool kWide>
constexpr int kRescoreWord = kWide ? 4 : 8;  // W float32, or 16 bits
__host__ __device__ inline int64_t rescore_words(int64_t d, bool wide) {
  const int64_t round = kWarp * kRescoreAhead;
  return ((wide ? d / 4 : d / 8) + round - 1) / round * round;
}
inline int64_t rescore_shared(int64_t d, bool wide) {
  return rescore_words(d, wide) * (wide ? 16 : 32);
}

// Row `token` of x to shared memory. Word c of a row of W meets floats 4 c .. 4 c + 3 of `x` and, if it has 8 elements,
// the same of the second half: so a warp reads 512 bytes in a row.
template <bool kWide>
__device__ inline void load_token(const Rows& rows, int64_t token, int64_t words, float4* x) {
  const int64_t width = words * kRescoreWord<kWide>;
  for (int64_t col = threadIdx.x * kChunk; col < width; col += kRescoreThreads * kChunk) {
    float v[kChunk];
    load_floats(rows, token, col, v);
    const int64_t at = col / kRescoreWord<kWide>;
    x[at] = make_float4(v[0], v[1], v[2], v[3]);
    x[kWide ? at + 1 : at + words] = make_float4(v[4], v[5], v[6], v[7]);
  }
}

__device__ inline float add_products(const float* w, const float4& x, float sum) {
  sum = fmaf(w[0], x.x, sum);
  sum = fmaf(w[1], x.y, sum);
  sum = fmaf(w[2], x.z, sum);
  return fmaf(w[3], x.w, sum);
}

// x . (rows a and b of W). One warp; every lane has the results.
template <bool kWide>
__device__ inline float2 two_dots(const char* a, const char* b, const float4* x, int64_t words,
                                  int64_t filled, int dtype) {
  float sum_a = 0.0f, sum_b = 0.0f;
  for (int64_t first = threadIdx.x % kWarp; first < words; first += kWarp * kRescoreAhead) {
    uint4 raw_a[kRescoreAhead], raw_b[kRescoreAhead];
#pragma unroll
    for (int i = 0; i < kRescoreAhead; ++i) {
      const int64_t at = first + kWarp * i;
      raw_a[i] = load_if(at < filled, a + at * 16);
      raw_b[i] = load_if(at < filled, b + at * 16);
    }
#pragma unroll
    for (int i = 0; i < kRescoreAhead; ++i) {
      const int64_t at = first + kWarp * i;
      const float4 low = x[at];
      if constexpr (kWide) {
        float wa[4], wb[4];
        widen_fp32(raw_a[i], wa);
        widen_fp32(raw_b[i], wb);
        sum_a = add_products(wa, low, sum_a);
        sum_b = add_products(wb, low, sum_b);
      } else {
        const float4 high = x[at + words];
        float wa[8], wb[8];
        if (dtype == kBFloat16) {
          widen_bf16(raw_a[i], wa);
          widen_bf16(raw_b[i], wb);
        } else {
          widen_fp16(raw_a[i], wa);
          widen_fp16(raw_b[i], wb);
        }
        sum_a = add_products(wa + 4, high, add_products(wa, low, sum_a));
        sum_b = add_products(wb + 4, high, add_products(wb, low, sum_b));
      }
    }
  }
  return make_float2(warp_sum(sum_a), warp_sum(sum_b));
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
