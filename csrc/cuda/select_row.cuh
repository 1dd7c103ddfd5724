// Selection of the k best of a row by the threads of a team, exact: select_rows_kernel.cuh.
//
// Algorithm: the range of the keys is cut into 256 equal bins, a histogram names the bin of the k-th largest, whose
// range is next: at most four passes for 31 bits, one or two as a rule, since it ends as soon as exactly k keys lie
// above. Bins of the range that is left spread the keys, so that few atomics collide.
#pragma once

#include <stdint.h>

#include "cuda/select_keys.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr uint32_t kSelectBins = 256;

struct SelectRows {
  Found found;
  int64_t n, k;      // k >= 1
  int32_t* latents;  // [n, k] the first counts[i] of row i are its best, ascending
  float* values;     // [n, k]
  int32_t* counts;   // [n] at most k
  float* bound;      // [n]
};

// kKeys: longest row whose keys stay in shared memory. kTeams rows at a time in one block.
template <int kWarps, int kTeams, uint32_t kKeys>
struct SelectShared {
  uint32_t keys[kTeams][kKeys];
  uint32_t bins[kTeams][kSelectBins];
  uint32_t words[kTeams][3 * kWarps];
};

// The keys in [low, high] hold the k-th largest; `above` keys lie above high, `count` at or above low.
struct KeyRange {
  uint32_t low, high, above, count;
};

// Least, largest and number of the keys that can be selected, over the team.
template <int kWarps>
__device__ inline KeyRange whole_range(KeyRange mine, uint32_t* words) {
  mine.low = __reduce_min_sync(kAllLanes, mine.low);
  mine.high = __reduce_max_sync(kAllLanes, mine.high);
  mine.count = __reduce_add_sync(kAllLanes, mine.count);
  if constexpr (kWarps > 1) {
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      words[3 * warp] = mine.low;
      words[3 * warp + 1] = mine.high;
      words[3 * warp + 2] = mine.count;
    }
    __syncthreads();
    mine.count = 0;
    for (int w = 0; w < kWarps; ++w) {
      mine.low = min(mine.low, words[3 * w]);
      mine.high = max(mine.high, words[3 * w + 1]);
      mine.count += words[3 * w + 2];
    }
    __syncthreads();
  }
  return mine;
}

// The range of a row's keys; they go to `keys` too, if that is not null. All threads of the team call it.
template <int kWarps, class Entries>
__device__ inline KeyRange read_keys(const Entries& row, uint32_t* keys, uint32_t* words) {
  using Threads = Team<kWarps>;
  KeyRange range = {~0u, 0, 0, 0};
  for (uint32_t at = Threads::thread(); at < row.total; at += Threads::kThreads) {
    const uint32_t key = row.key(at);
    if (keys != nullptr) keys[at] = key;
    if (key == 0) continue;
    range.low = min(range.low, key);
    range.high = max(range.high, key);
    ++range.count;
  }
  Threads::sync();
  return whole_range<kWarps>(range, words);
}

// The bin of the k-th largest key, from the histogram of the keys in `range`; every warp finds it by itself.
__device__ inline KeyRange narrowed(KeyRange range, uint32_t shift, const uint32_t* bins,
                                    uint32_t k) {
  constexpr uint32_t kEach = kSelectBins / 32;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t* mine = bins + (31 - lane) * kEach;  // lane 0 has the largest keys
  uint32_t sum = 0;
  for (uint32_t b = 0; b < kEach; ++b) sum += mine[b];
  uint32_t upto = sum;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  uint32_t before = range.above + upto - sum;
  const bool owner = before < k && k <= range.above + upto;
  uint32_t bin = kEach;
  uint32_t size = 0;
  if (owner) {
    do {
      before += size;
      size = mine[--bin];
    } while (before + size < k);
  }
  const int from = __ffs(__ballot_sync(kAllLanes, owner)) - 1;
  bin = __shfl_sync(kAllLanes, (31 - lane) * kEach + bin, from);
  range.above = __shfl_sync(kAllLanes, before, from);
  range.count = range.above + __shfl_sync(kAllLanes, size, from);
  range.low += bin << shift;
  range.high = min(range.high, range.low + ((1u << shift) - 1));
  return range;
}

template <int kWarps, class Entries, typename KeyAt>
__device__ inline KeyRange find_cut(const Entries& row, const KeyAt& key_at, KeyRange range,
                                    uint32_t k, uint32_t* bins) {
  using Threads = Team<kWarps>;
  while (range.low < range.high && range.count > k) {
    const int bits = 32 - __clz(static_cast<int>(range.high - range.low));
    const uint32_t shift = bits > 8 ? bits - 8 : 0;
    for (uint32_t b = Threads::thread(); b < kSelectBins; b += Threads::kThreads) bins[b] = 0;
    Threads::sync();
    for (uint32_t at = Threads::thread(); at < row.total; at += Threads::kThreads) {
      const uint32_t key = key_at(at);
      if (key >= range.low && key <= range.high) atomicAdd(bins + ((key - range.low) >> shift), 1u);
    }
    Threads::sync();
    range = narrowed(range, shift, bins, k);
    Threads::sync();
  }
  return range;
}

// One row by one team; returns when nothing of the row, shared memory included, is in use any more.
template <int kWarps, class Entries, typename KeyAt>
__device__ inline void select_row(const SelectRows& p, int64_t i, const Entries& row,
                                  const KeyAt& key_at, KeyRange range, uint32_t* bins,
                                  uint32_t* words) {
  const uint32_t k = static_cast<uint32_t>(p.k);
  range = find_cut<kWarps>(row, key_at, range, k, bins);
  // Either one key is left, or what lies at or above range.low is at most k keys.
  const uint32_t room = range.low == range.high ? k - range.above : k;
  KeyRange kept = {kNaNKey, 0, 0, 0};
  kept.low =
      compact<kWarps>(row, key_at, range.low, room, p.latents + i * p.k, p.values + i * p.k, words);
  Team<kWarps>::sync();
  kept = whole_range<kWarps>(kept, words);
  if (Team<kWarps>::thread() == 0) {
    p.counts[i] = static_cast<int32_t>(min(range.count, k));
    p.bound[i] = range.count >= k ? value_of(min(kept.low, kInfKey)) : 0.0f;
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
