// The exact pre-activations of candidates, and the entries among them.
//
//   pre[e] = x[token of e] . w[latent of e] + bias, float32, for candidates e in CSR; then the gate of jumprelu_encode
//
// rescore_kernel: a CTA takes kRescoreSpan consecutive candidates, whatever tokens they belong to, holds a token's x in
// shared memory as float32 and gives two candidates to a warp at a time. A lane sums the chunks 32 apart in order, and
// the lanes are added by a fixed tree: a value depends on its row and its latent alone. count_kept_kernel and
// keep_kernel: one warp per token walks the candidates 32 at a time, twice: to count what stays, and, once the counts
// have become offsets, to write it. Bound by memory: a candidate reads its row of W, 2 d bytes; 8 words of 16 bytes are
// in flight per lane.
#pragma once

#include "cuda/device.cuh"
#include "cuda/screened_rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kRescoreThreads = 256;
constexpr int kRescoreWarps = kRescoreThreads / kWarp;
constexpr int kRescoreSpan = 256;  // candidates of a CTA
constexpr int kRescoreAhead = 4;   // words in flight, of each of two candidates

struct Rescore {
  Rows x;                  // [n, d]
  Rows W;                  // [d_sae, d], wide
  const float* bias;       // [d_sae]
  const int64_t* offsets;  // [n + 1]
  const int32_t* indices;  // [count]
  float* values;           // [count]
  int64_t count;
};

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

// The token whose candidates include e: the last i with offsets[i] <= e.
__device__ inline int64_t token_of(const Rescore& p, int64_t e) {
  int64_t low = 0, high = p.x.rows - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (p.offsets[middle] <= e) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Dynamic shared memory: rescore_shared(d, kWide). One CTA per kRescoreSpan candidates.
template <bool kWide>
__global__ void __launch_bounds__(kRescoreThreads, 3) rescore_kernel(Rescore p) {
  GSF_DYNAMIC_SHARED(float4, x);
  const int64_t words = rescore_words(p.x.cols, kWide);
  const int64_t filled = p.x.cols / kRescoreWord<kWide>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRescoreSpan;
  const int64_t end = begin + kRescoreSpan < p.count ? begin + kRescoreSpan : p.count;
  for (int64_t e = begin; e < end;) {
    const int64_t token = token_of(p, e);
    const int64_t next = p.offsets[token + 1] < end ? p.offsets[token + 1] : end;
    __syncthreads();
    load_token<kWide>(p.x, token, words, x);
    __syncthreads();
    for (int64_t at = e + 2 * warp; at < next; at += 2 * kRescoreWarps) {
      const bool both = at + 1 < next;
      const int64_t j = p.indices[at], k = both ? p.indices[at + 1] : j;
      const float2 dots = two_dots<kWide>(chunk_address(p.W, j, 0), chunk_address(p.W, k, 0), x,
                                          words, filled, p.W.dtype);
      if (lane == 0) p.values[at] = dots.x + p.bias[j];
      if (lane == 1 && both) p.values[at + 1] = dots.y + p.bias[k];
    }
    e = next;
  }
}

// Candidates with their pre-activations, and where the entries among them go.
struct KeepEntries {
  const int64_t* offsets;  // [n + 1] of the candidates
  const int32_t* indices;
  const float* values;
  const float* threshold;  // [d_sae]
  float window;
  int64_t n;
  int64_t* kept_offsets;  // [n + 1]
  const int64_t* needed;  // [1] entries of the result
  int64_t capacity;
  int32_t* kept_indices;  // [capacity]
  float* kept_values;
  float* kept_gate;
};

struct Verdict {
  float pre, threshold;
  bool invalid, keep;
};

// Candidate e of a token, `end` its last and one. An invalid one stays if it is the first of its token. One warp,
// together.
__device__ inline Verdict judge(const KeepEntries& p, int64_t e, int64_t end, bool& invalid_seen) {
  Verdict v = {0.0f, 0.0f, false, false};
  if (e < end) {
    v.pre = p.values[e];
    v.threshold = p.threshold[p.indices[e]];
    v.invalid = v.pre != v.pre || v.threshold != v.threshold;
    v.keep = v.pre > v.threshold - p.window;  // false where invalid
  }
  const unsigned invalid = __ballot_sync(kAllLanes, v.invalid);
  if (invalid != 0 && !invalid_seen) {
    v.keep = v.keep || (v.invalid && (invalid & ((1u << (threadIdx.x % kWarp)) - 1)) == 0);
    invalid_seen = true;
  }
  return v;
}

__device__ inline int64_t keep_first() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ inline int64_t keep_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
}

__global__ void __launch_bounds__(kRescoreThreads, 4) count_kept_kernel(KeepEntries p) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t token = keep_first(); token < p.n; token += keep_step()) {
    const int64_t end = p.offsets[token + 1];
    bool invalid_seen = false;
    int64_t kept = 0;
    for (int64_t e = p.offsets[token]; e < end; e += kWarp) {
      const Verdict v = judge(p, e + lane, end, invalid_seen);
      kept += __popc(__ballot_sync(kAllLanes, v.keep));
    }
    if (lane == 0) p.kept_offsets[token] = kept;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.kept_offsets[p.n] = 0;
}

// Nothing is written where the result does not fit.
__global__ void __launch_bounds__(kRescoreThreads, 4) keep_kernel(KeepEntries p) {
  if (*p.needed > p.capacity) return;
  const int lane = threadIdx.x % kWarp;
  for (int64_t token = keep_first(); token < p.n; token += keep_step()) {
    const int64_t end = p.offsets[token + 1];
    bool invalid_seen = false;
    int64_t to = p.kept_offsets[token];
    for (int64_t e = p.offsets[token]; e < end; e += kWarp) {
      const Verdict v = judge(p, e + lane, end, invalid_seen);
      const unsigned kept = __ballot_sync(kAllLanes, v.keep);
      if (v.keep) {
        const int64_t at = to + __popc(kept & ((1u << lane) - 1));
        const bool active = v.pre > v.threshold;
        p.kept_indices[at] = p.indices[e + lane];
        p.kept_values[at] = v.invalid ? __int_as_float(0x7fc00000) : active ? v.pre + 0.0f : 0.0f;
        p.kept_gate[at] = v.invalid || active ? 1.0f : 0.0f;
      }
      to += __popc(kept);
    }
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
