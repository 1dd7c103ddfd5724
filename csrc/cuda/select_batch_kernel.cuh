// Device code of batchtopk_encode's selection: the `rank` best entries of a whole batch, exact, as CSR.
//
//   selected = keys above the cut, and of those equal to it the first `equal` by (row, latent)
//   offsets[i] = above_before(i) + min(equal_before(i), equal)
//   bound[i]   = what a later latent has to exceed: the cut, or the value below it in rows that can still win a tie
//
// Algorithm: three histograms of the keys' digits, 11, 10 and 10 bits, find the cut; each launch reads the one before
// it, so nothing is decided on the host. One warp per row counts its keys, one block scans the counts, one warp per row
// places. All atomics add integers, so no result depends on their order.
// Bound: memory, 28 bytes per candidate; launches. Exchangeable latents give about `rank` candidates per doubling of
// the latents seen.
#pragma once

#include <stdint.h>

#include "cuda/select_keys.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kBatchThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int kBatchLevels = 3;
constexpr int kBatchBins = 2048;

// The cut's digits so far, and its rank among the keys that share them; {0, 0} where there are fewer keys than wanted.
struct BatchCut {
  uint64_t key;
  uint64_t rank;
};

struct SelectBatch {
  Found found;  // of rows [first_row, first_row + rows); the others found nothing
  int64_t first_row, rows;
  int64_t n;
  int64_t rank;                 // >= 1
  const int64_t* kept_offsets;  // [n + 1]
  const int32_t* kept_latents;  // room for all that can be selected
  const float* kept_values;

  // Workspace.
  unsigned long long* histograms;  // [kBatchLevels][kBatchBins] starts at 0
  BatchCut* cuts;                  // [kBatchLevels + 1] the first is not used
  int64_t* above;                  // [n] keys above the cut
  int64_t* equal;                  // [n] keys equal to it, after the scan: in the rows before

  // Outputs; those of the entries kept are other arrays than the inputs.
  int64_t* offsets;
  int32_t* latents;
  float* values;
  float* bound;      // [n]
  float* threshold;  // the cut, 0 where there are fewer than `rank` keys
};

__host__ __device__ constexpr int digit_bits(int level) { return level == 0 ? 11 : 10; }
__host__ __device__ constexpr int digit_shift(int level) { return 20 - 10 * level; }

// Sum over the threads before this one, and over all, of up to 32 warps. `sums`: 32 words of shared memory. For blocks.
struct Scanned {
  uint64_t before, all;
};

template <int kThreads>
__device__ inline Scanned scan_block(uint64_t mine, unsigned long long* sums) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned long long upto = mine;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  Scanned result = {upto - mine, 0};
  for (uint32_t w = 0; w < kThreads / 32; ++w) {
    result.before += w < warp ? sums[w] : 0;
    result.all += sums[w];
  }
  __syncthreads();
  return result;
}

struct CutShared {
  unsigned long long sums[32];
  BatchCut cut;
};

// The cut through `level`, from its histogram and the cut before it; the same for all threads of a block.
__device__ inline BatchCut next_cut(const unsigned long long* histogram, BatchCut cut, int level,
                                    CutShared& shared) {
  const int bins = 1 << digit_bits(level), each = bins / kBatchThreads;
  const unsigned long long* mine = histogram + (kBatchThreads - 1 - threadIdx.x) * each;
  uint64_t sum = 0;
  for (int b = 0; b < each; ++b) sum += mine[b];
  uint64_t before = scan_block<kBatchThreads>(sum, shared.sums).before;  // thread 0 has the largest
  if (threadIdx.x == 0) shared.cut = {0, 0};
  __syncthreads();
  if (before < cut.rank && cut.rank <= before + sum) {
    int bin = each - 1;
    while (before + mine[bin] < cut.rank) before += mine[bin--];
    const uint64_t digit = static_cast<uint64_t>(mine - histogram) + bin;
    shared.cut = {cut.key << digit_bits(level) | digit, cut.rank - before};
  }
  __syncthreads();
  cut = shared.cut;
  __syncthreads();
  return cut;
}

// The cut through `level - 1`, kept in p.cuts[level] for the launch after this one.
__device__ inline BatchCut cut_before(const SelectBatch& p, int level, CutShared& shared) {
  BatchCut cut = {0, static_cast<uint64_t>(p.rank)};
  if (level == 0) return cut;
  if (level > 1) cut = p.cuts[level - 1];
  cut = next_cut(p.histograms + (level - 1) * kBatchBins, cut, level - 1, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.cuts[level] = cut;
  return cut;
}

__global__ void __launch_bounds__(kBatchThreads)
    select_batch_histogram_kernel(SelectBatch p, int level) {
  __shared__ CutShared shared;
  __shared__ uint32_t sizes[kBatchBins];
  const BatchCut cut = cut_before(p, level, shared);
  for (int b = threadIdx.x; b < kBatchBins; b += kBatchThreads) sizes[b] = 0;
  __syncthreads();
  const int shift = digit_shift(level), bits = digit_bits(level);
  const int64_t kept = p.kept_offsets[p.n];
  const int64_t total = kept + (dropped(p.found) ? 0 : p.found.offsets[p.rows]);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBatchThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kBatchThreads + threadIdx.x;
       at < total && cut.rank > 0; at += step) {
    const uint32_t key = key_of(at < kept ? p.kept_values[at] : p.found.values[at - kept]);
    if (key != 0 && key >> shift >> bits == cut.key) {
      atomicAdd(sizes + ((key >> shift) & ((1u << bits) - 1)), 1u);
    }
  }
  __syncthreads();
  unsigned long long* histogram = p.histograms + level * kBatchBins;
  for (int b = threadIdx.x; b < kBatchBins; b += kBatchThreads) {
    if (sizes[b] > 0) atomicAdd(histogram + b, static_cast<unsigned long long>(sizes[b]));
  }
  if (level == 0 && blockIdx.x == 0 && threadIdx.x == 0) record_loss(p.found);
}

// Row i of a merge.
__device__ inline Row batch_row(const SelectBatch& p, int64_t i, bool none_found) {
  const int64_t *kept_at = p.kept_offsets + i, *found_at = p.found.offsets + (i - p.first_row);
  const bool none = none_found || i < p.first_row || i >= p.first_row + p.rows;
  const int64_t old = kept_at[0], recent = none ? 0 : found_at[0];
  const int64_t kept = kept_at[1] - old;
  const int64_t total = kept + (none ? 0 : found_at[1] - recent);
  return {p.kept_latents + old,    p.found.latents + recent,    p.kept_values + old,
          p.found.values + recent, static_cast<uint32_t>(kept), static_cast<uint32_t>(total)};
}

__global__ void __launch_bounds__(kBatchThreads) select_batch_count_kernel(SelectBatch p) {
  __shared__ CutShared shared;
  const BatchCut cut = cut_before(p, kBatchLevels, shared);
  const bool none_found = dropped(p.found);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.threshold = value_of(static_cast<uint32_t>(cut.key));
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kBatchThreads / 32);
  const uint32_t lane = threadIdx.x % 32;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBatchThreads + threadIdx.x) / 32; i < p.n;
       i += step) {
    const Row row = batch_row(p, i, none_found);
    uint32_t above = 0, equal = 0;
    for (uint32_t at = lane; at < row.total; at += 32) {
      const uint32_t key = row.key(at);
      above += key > cut.key;
      equal += key == cut.key && key != 0;
    }
    above = __reduce_add_sync(kAllLanes, above);
    equal = __reduce_add_sync(kAllLanes, equal);
    if (lane == 0) {
      p.above[i] = above;
      p.equal[i] = equal;
    }
  }
}

// One block: offsets, the equal keys before each row, and the bounds.
__global__ void __launch_bounds__(kScanThreads) select_batch_scan_kernel(SelectBatch p) {
  __shared__ unsigned long long sums[32];
  const BatchCut cut = p.cuts[kBatchLevels];
  const uint32_t key = static_cast<uint32_t>(cut.key);
  uint64_t above_seen = 0, equal_seen = 0;
  if (threadIdx.x == 0) p.offsets[0] = 0;
  for (int64_t start = 0; start < p.n; start += kScanThreads) {
    const int64_t i = start + threadIdx.x;
    const uint64_t above = i < p.n ? p.above[i] : 0, equal = i < p.n ? p.equal[i] : 0;
    const Scanned aboves = scan_block<kScanThreads>(above, sums);
    const Scanned equals = scan_block<kScanThreads>(equal, sums);
    if (i < p.n) {
      const uint64_t before = equal_seen + equals.before, after = before + equal;
      const bool wins_ties = key != 0 && after < cut.rank;
      p.equal[i] = static_cast<int64_t>(before);
      p.offsets[i + 1] = static_cast<int64_t>(above_seen + aboves.before + above +
                                              (after < cut.rank ? after : cut.rank));
      p.bound[i] = value_of(min(wins_ties ? key - 1 : key, kInfKey));
    }
    above_seen += aboves.all;
    equal_seen += equals.all;
  }
}

__global__ void __launch_bounds__(kBatchThreads) select_batch_place_kernel(SelectBatch p) {
  const BatchCut cut = p.cuts[kBatchLevels];
  const bool none_found = dropped(p.found);
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kBatchThreads / 32);
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBatchThreads + threadIdx.x) / 32; i < p.n;
       i += step) {
    const Row row = batch_row(p, i, none_found);
    const uint64_t before = static_cast<uint64_t>(p.equal[i]);
    const uint64_t left = cut.rank > before ? cut.rank - before : 0;
    const uint32_t room = static_cast<uint32_t>(left < row.total ? left : row.total);
    const auto key_at = [&row](uint32_t at) { return row.key(at); };
    compact<1>(row, key_at, static_cast<uint32_t>(cut.key), room, p.latents + p.offsets[i],
               p.values + p.offsets[i], nullptr);
  }
}

// The result in arrays of `capacity` elements. More entries than that clamp the offsets; then, or where candidates were
// lost, all values are NaN. What was lost might have been anything, so `needed` is then that of all pairs.
struct WriteBatch {
  const int64_t* kept_offsets;
  const int32_t* kept_latents;
  const float* kept_values;
  const int64_t* lost;  // [blocks] below d_sae: candidates of these rows were lost
  int64_t blocks, n, d_sae, capacity;
  int64_t* offsets;  // [n + 1]
  int32_t* latents;  // [capacity]
  float* values;     // [capacity]
  float* gate;       // [capacity]
  int64_t* needed;
};

__global__ void __launch_bounds__(kBatchThreads) write_batch_kernel(WriteBatch p) {
  const int64_t needed = p.kept_offsets[p.n];
  bool lost = false;
  for (int64_t b = threadIdx.x; b < p.blocks; b += kBatchThreads) lost |= p.lost[b] < p.d_sae;
  lost = __syncthreads_or(lost) != 0;
  const bool failed = lost || needed > p.capacity;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBatchThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBatchThreads + threadIdx.x;
  if (thread == 0) *p.needed = lost ? max(p.n * p.d_sae, p.capacity + 1) : needed;
  for (int64_t i = thread; i <= p.n; i += step) p.offsets[i] = min(p.kept_offsets[i], p.capacity);
  for (int64_t e = thread; e < p.capacity; e += step) {
    const bool used = e < needed;
    p.latents[e] = used ? p.kept_latents[e] : 0;
    p.values[e] = failed ? value_of(kNaNKey) : used ? p.kept_values[e] : 0.0f;
    p.gate[e] = failed || used ? 1.0f : 0.0f;
  }
}

// Grid for `size` items, one thread each, at most `most` blocks; the kernels loop over the rest.
inline unsigned batch_grid(int64_t size, int64_t most) {
  const int64_t blocks = (size + kBatchThreads - 1) / kBatchThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
