// The exact pre-activations of candidates, and the entries among them.
//
//   pre[e] = x[token of e] . w[latent of e] + bias, float32, for candidates e in CSR; then the gate of jumprelu_encode
//
// rescore_kernel: a CTA takes kRescoreSpan consecutive candidates, whatever tokens they belong to, and sums as
// rescore_dots.cuh says. count_kept_kernel and keep_kernel: one warp per token walks the candidates 32 at a time, twice:
// to count what stays, and, once the counts have become offsets, to write it.
#pragma once

#include "cuda/rescore_dots.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kRescoreSpan = 256;  // candidates of a CTA

struct Rescore {
  Rows x;                  // [n, d]
  Rows W;                  // [d_sae, d], wide
  const float* bias;       // [d_sae]
  const int64_t* offsets;  // [n + 1]
  const int32_t* indices;  // [count]
  float* values;           // [count]
  int64_t count;
};

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
