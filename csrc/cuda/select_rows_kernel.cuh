// Device code of topk_encode's selection: the k best of each row, exact, and the rows of exactly k entries at the end.
//
//   best(i) = the k largest of best(i) followed by found(i), ties to the earlier position, in latent order
//   bound[i] = the k-th largest, 0 while there are fewer: a later latent enters only above it (it loses ties) or as NaN
//
// Algorithm: keys go to shared memory, where rows fit, and select_row.cuh finds the k-th largest. One warp per row for
// short rows, a block of 8 for long ones; what does not fit is read from memory in each pass.
// Bound: latency. The traffic is 8 bytes per candidate. Exchangeable latents give about k candidates per row and
// doubling of the latents seen, so k log2(d_sae / first) in all, and the first chunk's positive entries, about first /
// 2.
#pragma once

#include "cuda/select_row.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Rows as long as a first chunk of this width go to one warp each.
constexpr uint32_t kWarpKeys = 1024;
constexpr int kWarpRows = 4;
// Longer ones to a block each: k + what a chunk holds, for k up to about 2,000, stays in 32 KiB.
constexpr uint32_t kBlockKeys = 8192;
constexpr int kBlockWarps = 8;

// kKeys: longest row whose keys stay in shared memory. kTeams rows at a time in one block.
template <int kWarps, int kTeams, uint32_t kKeys>
struct SelectShared {
  uint32_t keys[kTeams][kKeys];
  uint32_t bins[kTeams][kSelectBins];
  uint32_t words[kTeams][3 * kWarps];
};

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
  const int64_t* which;  // [n] where the rows go, or null: 0, 1, 2, ...
  int64_t* offsets;      // [rows + 1]
  int32_t* out_latents;  // [rows, k]
  float* out_values;     // [rows, k]
  float* gate;           // [rows, k]
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
    const int64_t to = p.which == nullptr ? i : p.which[i], row = to * p.k, kept = i * p.k;
    if (lane == 0) p.offsets[to + 1] = row + p.k;
    for (int64_t e = lane; e < p.k && m < p.k; e += 32) {
      p.out_latents[row + e] = static_cast<int32_t>(e);
      p.out_values[row + e] = lost ? value_of(kNaNKey) : 0.0f;
      p.gate[row + e] = lost ? 1.0f : 0.0f;
    }
    __syncwarp();
    for (int64_t e = lane; e < m; e += 32) {
      const int64_t latent = p.latents[kept + e];
      const int64_t target = row + e + min(latent - e, p.k - m);
      p.out_latents[target] = static_cast<int32_t>(latent);
      p.out_values[target] = lost ? value_of(kNaNKey) : p.values[kept + e];
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
