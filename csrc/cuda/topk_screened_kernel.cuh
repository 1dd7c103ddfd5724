// Device code of the screened TopK encoder: of what int8 products left of a row, the k best by exact pre-activations.
//
//   upper(i, j) = the most that pre(i, j) can be (quantise_kernel.cuh), kept of the `room` > k largest of a row
//   pre(i, j)   = x_i . w_j + bias_j, float32, of those that can be among the k best
//
// A latent that was not kept has pre <= upper <= the smallest upper kept. So the k best of the kept ones are the row's
// if the k-th of them exceeds that, or if no more than `room` latents can be positive. Else, and where a token has no
// codes, the row is told, for the plain encoder to serve.
//
// Algorithm: a CTA takes a row, x in shared memory as float32. The k largest uppers are decided first; the least of
// their pre-activations is what the other uppers have to reach to be decided as well (half of them, or fewer). Dots are
// those of rescore_dots.cuh: a value depends on its row and its latent alone.
// Bound by memory: a decision reads its row of W, 2 d bytes.
#pragma once

#include "cuda/rescore_dots.cuh"
#include "cuda/select_row.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int64_t kMostScreenedRoom = 2048;

// Uppers kept of a row: those of latents whose pre lies within a margin of the k-th best. Of Gaussian pre-activations
// these are k exp(z m), z the quantile of k / d_sae and m the margin, both in standard deviations: 1.4 k at 262,144
// latents, k = 64. The rest is for the rows where order statistics spread more, mostly those of small k.
inline int64_t screened_room(int64_t k, int64_t d_sae) {
  const int64_t room = 2 * k + 32;
  return room < d_sae ? room : d_sae;
}

struct DecideRows {
  Rows x;                  // [n, d]
  Rows W;                  // [d_sae, d], wide
  const float* bias;       // [d_sae]
  const float* scale;      // [n] 0: the token has no codes
  int64_t room;            // k <= room <= kMostScreenedRoom
  const int32_t* latents;  // [n, room] ascending
  const float* uppers;     // [n, room]
  const int32_t* counts;   // [n]
  const float* bound;      // [n] the smallest upper of a full row, 0 where it is not full
  SelectRows to;           // rows of k; `found` is not read
  int64_t* unsure;         // [n] rows that the plain encoder must serve, in any order
  unsigned long long*
      sizes;  // how many these are, and how many pre-activations there were; both start at 0
};

// Dynamic shared memory behind the token: keys of the uppers, keys of the pre-activations (0: not decided, or nothing
// that can be selected), positions to decide.
struct DecideShared {
  uint32_t *upper, *exact, *list;
};
inline int64_t decide_shared(int64_t d, bool wide, int64_t room) {
  return rescore_shared(d, wide) + 3 * room * static_cast<int64_t>(sizeof(uint32_t));
}

struct DecideScratch {
  uint32_t bins[kSelectBins];
  uint32_t words[3 * kRescoreWarps];
  uint32_t listed;
};

// Lists the positions whose upper has a key in [low, high]; returns how many. Their order does not matter.
__device__ inline uint32_t list_keys(const DecideShared& row, uint32_t total, uint32_t low,
                                     uint32_t high, DecideScratch& scratch) {
  if (threadIdx.x == 0) scratch.listed = 0;
  __syncthreads();
  for (uint32_t at = threadIdx.x; at < total; at += kRescoreThreads) {
    const uint32_t key = row.upper[at];
    if (key >= low && key <= high) row.list[atomicAdd(&scratch.listed, 1u)] = at;
  }
  __syncthreads();
  const uint32_t listed = scratch.listed;
  __syncthreads();
  return listed;
}

// Pre-activations of what is listed. `latents` are the row's.
template <bool kWide>
__device__ inline void decide_listed(const DecideRows& p, const int32_t* latents,
                                     const DecideShared& row, uint32_t listed, const float4* x,
                                     int64_t words) {
  const int64_t filled = p.x.cols / kRescoreWord<kWide>;
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t e = 2 * (threadIdx.x / kWarp); e < listed; e += 2 * kRescoreWarps) {
    const bool both = e + 1 < listed;
    const uint32_t first = row.list[e], second = both ? row.list[e + 1] : first;
    const int64_t j = latents[first], k = latents[second];
    const float2 dots = two_dots<kWide>(chunk_address(p.W, j, 0), chunk_address(p.W, k, 0), x,
                                        words, filled, p.W.dtype);
    if (lane == 0) row.exact[first] = key_of(dots.x + p.bias[j]);
    if (lane == 1 && both) row.exact[second] = key_of(dots.y + p.bias[k]);
  }
  __syncthreads();
}

// Range of the keys at the positions that a thread visits, over the block; keys of 0 are left out.
template <typename KeyAt>
__device__ inline KeyRange range_of(uint32_t total, const KeyAt& key_at, uint32_t* words) {
  KeyRange range = {~0u, 0, 0, 0};
  for (uint32_t at = threadIdx.x; at < total; at += kRescoreThreads) {
    const uint32_t key = key_at(at);
    if (key == 0) continue;
    range.low = min(range.low, key);
    range.high = max(range.high, key);
    ++range.count;
  }
  return whole_range<kRescoreWarps>(range, words);
}

// Decides what can be among the row's k best; returns how many.
template <bool kWide>
__device__ inline uint32_t decide_row(const DecideRows& p, const Row& kept, const DecideShared& row,
                                      DecideScratch& scratch, const float4* x, int64_t words) {
  const uint32_t k = static_cast<uint32_t>(p.to.k);
  const auto upper_at = [&row](uint32_t at) { return row.upper[at]; };
  KeyRange range = range_of(kept.total, upper_at, scratch.words);
  range = find_cut<kRescoreWarps>(kept, upper_at, range, k, scratch.bins);
  const uint32_t first = list_keys(row, kept.total, range.low, ~0u, scratch);
  decide_listed<kWide>(p, kept.kept_latents, row, first, x, words);
  if (first == kept.total) return first;
  const auto listed_at = [&row](uint32_t at) { return row.exact[row.list[at]]; };
  const KeyRange decided = range_of(first, listed_at, scratch.words);
  // At least k are decided. Where one of them cannot be selected, anything positive can.
  const uint32_t least = decided.count < first ? 1 : decided.low;
  if (least >= range.low) return first;
  const uint32_t second = list_keys(row, kept.total, least, range.low - 1, scratch);
  decide_listed<kWide>(p, kept.kept_latents, row, second, x, words);
  return first + second;
}

// The k best of a row; where they may not be, the row is told.
__device__ inline void finish_row(const DecideRows& p, int64_t i, const Row& kept,
                                  const DecideShared& row, DecideScratch& scratch,
                                  uint32_t decided) {
  const auto exact_at = [&row](uint32_t at) { return row.exact[at]; };
  const KeyRange range = range_of(kept.total, exact_at, scratch.words);
  if (range.count > 0) {
    select_row<kRescoreWarps>(p.to, i, kept, exact_at, range, scratch.bins, scratch.words);
  } else if (threadIdx.x == 0) {
    p.to.counts[i] = 0;
    p.to.bound[i] = 0.0f;
  }
  if (threadIdx.x != 0) return;
  atomicAdd(p.sizes + 1, static_cast<unsigned long long>(decided));
  const bool sure = p.scale[i] != 0.0f && (p.bound[i] == 0.0f || p.to.bound[i] > p.bound[i]);
  if (!sure) p.unsure[atomicAdd(p.sizes, 1ull)] = i;
}

// Dynamic shared memory: decide_shared.
template <bool kWide>
__global__ void __launch_bounds__(kRescoreThreads, kWide ? 2 : 3) decide_rows_kernel(DecideRows p) {
  GSF_DYNAMIC_SHARED(float4, x);
  __shared__ DecideScratch scratch;
  const int64_t words = rescore_words(p.x.cols, kWide);
  DecideShared row;
  row.upper = reinterpret_cast<uint32_t*>(x + words * (kWide ? 1 : 2));
  row.exact = row.upper + p.room;
  row.list = row.exact + p.room;
  for (int64_t i = blockIdx.x; i < p.to.n; i += gridDim.x) {
    const uint32_t total = static_cast<uint32_t>(p.counts[i]);
    const int64_t at = i * p.room;
    const Row kept = {p.latents + at, nullptr, p.uppers + at, nullptr, total, total};
    __syncthreads();
    if (total > 0) load_token<kWide>(p.x, i, words, x);
    for (uint32_t e = threadIdx.x; e < total; e += kRescoreThreads) {
      row.upper[e] = kept.key(e);
      row.exact[e] = 0;
    }
    __syncthreads();
    const uint32_t decided = total > 0 ? decide_row<kWide>(p, kept, row, scratch, x, words) : 0;
    finish_row(p, i, kept, row, scratch, decided);
  }
}

// Rows `which` of `words` words of 16 bytes each, `stride` words apart, one after another.
__global__ void __launch_bounds__(kRescoreThreads)
    gather_rows_kernel(const uint4* rows, int64_t stride, const int64_t* which, int64_t count,
                       int64_t words, uint4* out) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const uint4* from = rows + which[i] * stride;
    for (int64_t w = threadIdx.x; w < words; w += blockDim.x) out[i * words + w] = from[w];
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
