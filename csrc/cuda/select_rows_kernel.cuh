// Device code of topk_encode's selection: the k best of each row, exact, and the rows of exactly k entries at the end.
//
//   best(i) = the k largest of best(i) followed by found(i), ties to the earlier position, in latent order
//   bound[i] = the k-th largest, 0 while there are fewer: a later latent enters only above it (it loses ties) or as NaN
//
// Algorithm: keys go to shared memory, where rows fit. Their range is cut into 256 equal bins, a histogram names the
// bin of the k-th largest, whose range is next: at most four passes for 31 bits, one or two as a rule, since it ends as
// soon as exactly k keys lie above. Bins of the range that is left spread the keys, so that few atomics collide. One
// warp per row for short rows, a block of 8 for long ones; what does not fit is read from memory in each pass.
// Bound: latency. The traffic is 8 bytes per candidate. Exchangeable latents give about k candidates per row and
// doubling of the latents seen, so k log2(d_sae / first) in all, and the first chunk's positive entries, about first /
// 2.
#pragma once

#include <stdint.h>

#include "cuda/select_keys.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Rows as long as a first chunk of this width go to one warp each.
constexpr uint32_t kWarpKeys = 1024;
constexpr int kWarpRows = 4;
// Longer ones to a block each: k + what a chunk holds, for k up to about 2,000, stays in 32 KiB.
constexpr uint32_t kBlockKeys = 8192;
constexpr int kBlockWarps = 8;
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

template <int kWarps, typename KeyAt>
__device__ inline KeyRange find_cut(const Row& row, const KeyAt& key_at, KeyRange range, uint32_t k,
                                    uint32_t* bins) {
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
template <int kWarps, typename KeyAt>
__device__ inline void select_row(const SelectRows& p, int64_t i, const Row& row,
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

template <int kWarps, int kTeams, uint32_t kKeys>
__global__ void __launch_bounds__(32 * kWarps * kTeams) select_rows_kernel(SelectRows p) {
  using Threads = Team<kWarps>;
  __shared__ SelectShared<kWarps, kTeams, kKeys> shared;
  if (dropped(p.found)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) record_loss(p.found);
    return;
  }
  const int team = kWarps == 1 ? threadIdx.x / 32 : 0;
  uint32_t* keys = shared.keys[team];
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTeams + team; i < p.n;
       i += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t begin = p.found.offsets[i];
    const uint32_t found = static_cast<uint32_t>(p.found.offsets[i + 1] - begin);
    if (found == 0) continue;
    const uint32_t kept = static_cast<uint32_t>(p.counts[i]);
    const Row row = {p.latents + i * p.k,
                     p.found.latents + begin,
                     p.values + i * p.k,
                     p.found.values + begin,
                     kept,
                     kept + found};
    const bool fits = row.total <= kKeys;
    KeyRange range = {~0u, 0, 0, 0};
    for (uint32_t at = Threads::thread(); at < row.total; at += Threads::kThreads) {
      const uint32_t key = row.key(at);
      if (fits) keys[at] = key;
      if (key == 0) continue;
      range.low = min(range.low, key);
      range.high = max(range.high, key);
      ++range.count;
    }
    Threads::sync();
    range = whole_range<kWarps>(range, shared.words[team]);
    if (range.count == 0) continue;
    if (fits) {
      const auto key_at = [keys](uint32_t at) { return keys[at]; };
      select_row<kWarps>(p, i, row, key_at, range, shared.bins[team], shared.words[team]);
    } else {
      const auto key_at = [&row](uint32_t at) { return row.key(at); };
      select_row<kWarps>(p, i, row, key_at, range, shared.bins[team], shared.words[team]);
    }
  }
}

// Rows of exactly k entries: with m best entries a row takes the k - m smallest other latents, at value 0. Entry e, at
// latent l, has l - e other latents below it, so it lies at e + min(l - e, k - m). The positions left hold fillers, and
// a filler lies at the position that is its own latent: all latents below it are in the row.
struct FillRows {
  const int32_t* latents;  // [n, k]
  const float* values;     // [n, k]
  const int32_t* counts;   // [n]
  const int64_t*
      lost;  // [blocks of `together` rows] below d_sae: the block lost candidates, its values are NaN
  int64_t n, k, d_sae, together;
  int64_t* offsets;      // [n + 1]
  int32_t* out_latents;  // [n, k]
  float* out_values;     // [n, k]
  float* gate;           // [n, k]
};

constexpr int kFillThreads = 256;

__global__ void __launch_bounds__(kFillThreads) fill_rows_kernel(FillRows p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kFillThreads / 32);
  const uint32_t lane = threadIdx.x % 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[0] = 0;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x) / 32; i < p.n;
       i += step) {
    const bool lost = p.lost[i / p.together] < p.d_sae;
    const int64_t m = p.counts[i];
    const int64_t row = i * p.k;
    if (lane == 0) p.offsets[i + 1] = row + p.k;
    for (int64_t e = lane; e < p.k && m < p.k; e += 32) {
      p.out_latents[row + e] = static_cast<int32_t>(e);
      p.out_values[row + e] = lost ? value_of(kNaNKey) : 0.0f;
      p.gate[row + e] = lost ? 1.0f : 0.0f;
    }
    __syncwarp();
    for (int64_t e = lane; e < m; e += 32) {
      const int64_t latent = p.latents[row + e];
      const int64_t target = row + e + min(latent - e, p.k - m);
      p.out_latents[target] = static_cast<int32_t>(latent);
      p.out_values[target] = lost ? value_of(kNaNKey) : p.values[row + e];
      p.gate[target] = 1.0f;
    }
  }
}

// The kernels loop over what more blocks would do.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks<1 ? 1 : blocks>(1 << 20) ? 1 << 20 : blocks);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
