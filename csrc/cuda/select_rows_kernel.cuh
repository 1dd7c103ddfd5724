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

#include "cuda/fill_row.cuh"
#include "cuda/select_row.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Rows as long as a first chunk of this width go to one warp each.
constexpr uint32_t kWarpKeys = 1024;
constexpr int kWarpRows = 4;
// Longer ones to a block each: k + what a chunk holds, for k up to about 2,000, stays in 32 KiB.
constexpr uint32_t kBlockKeys = 8192;
constexpr int kBlockWarps = 8;

template <int kWarps, int kTeams, uint32_t kKeys>
__global__ void __launch_bounds__(32 * kWarps * kTeams) select_rows_kernel(SelectRows p) {
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
    const KeyRange range = read_keys<kWarps>(row, fits ? keys : nullptr, shared.words[team]);
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

constexpr int kFillThreads = 256;

__global__ void __launch_bounds__(kFillThreads) fill_rows_kernel(FillRows p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kFillThreads / 32);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[0] = 0;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x) / 32; i < p.n;
       i += step) {
    fill_row<1>(p, i);
  }
}

// The kernels loop over what more blocks would do.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks<1 ? 1 : blocks>(1 << 20) ? 1 << 20 : blocks);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
