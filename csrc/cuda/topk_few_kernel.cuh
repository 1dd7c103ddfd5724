// TopK of at most 16 tokens in two kernels: all keys of the product, then the k best of each token.
//
//   keys[i, j] = the key of pre[i, j] (select_keys.cuh), highest[i, g] = the largest key of latents 32 g .. 32 g + 31
//   best(i) = the k best of the groups whose highest key is not below the k-th of all highest keys
//
// k groups have a key that large, so the k best are not below it, and groups that stay below it hold none of them: where
// no highest keys tie, k groups are read again, 128 k bytes. Few tokens make the keys a small thing to write, 4 n bytes
// beside the 2 d of a latent's row of W; prefixes, which write only candidates, would cost about twenty launches and a
// wait.
// Bound by the read of W (encode_few_kernel.cuh); the selection by latency.
#pragma once

#include "cuda/encode_few_kernel.cuh"
#include "cuda/fill_row.cuh"
#include "cuda/select_row.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kGroup = kFewWidth;  // latents of a group: those of a strip
constexpr int kTopkFewWarps = 16;  // that select for a token
constexpr uint32_t kTopkFewKeys =
    8192;  // that stay in shared memory: 262,144 latents have as many groups

struct FewKeys {
  uint32_t* keys;     // [n, groups, 32]; 0 beyond the last latent
  uint32_t* highest;  // [n, groups]
  int64_t groups;
};

// The sums of one strip: two tokens of a lane, pairs of latents.
__device__ __forceinline__ void write_keys(const EncodeTiles& p, const FewKeys& out, int64_t group,
                                           const float (&sums)[kFewWidth / 8][4],
                                           const float* bias) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const int64_t inside = p.last - p.first - group * kGroup;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = lane / 4 + 8 * half, row = token * out.groups + group;
    uint32_t highest = 0;
#pragma unroll
    for (int m = 0; m < kFewWidth / 8; ++m) {
      const int at = 8 * m + column;
      const uint2 pair = {at < inside ? key_of(sums[m][2 * half] + bias[at]) : 0,
                          at + 1 < inside ? key_of(sums[m][2 * half + 1] + bias[at + 1]) : 0};
      if (token < p.n) *reinterpret_cast<uint2*>(out.keys + row * kGroup + at) = pair;
      highest = max(highest, max(pair.x, pair.y));
    }
    highest = max(highest, __shfl_xor_sync(kWholeWarp, highest, 1));
    highest = max(highest, __shfl_xor_sync(kWholeWarp, highest, 2));
    if (token < p.n && lane % 4 == 0) out.highest[row] = highest;
  }
}

// A block per 64 latents of [first, last); n <= 16. Of p the operands, the bias and the ranges are read.
template <typename T>
__global__ void __launch_bounds__(kFewThreads, kFewBlocks)
    few_keys_kernel(EncodeTiles p, FewKeys out) {
  GSF_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kFewStrips + threadIdx.x / 32;
  const int64_t latent0 = p.first + static_cast<int64_t>(blockIdx.x) * kFewLatents;
  float* bias = reinterpret_cast<float*>(shared + kFewStages * kFewStageBytes);
  const auto read_bias = [&] {
    few_limits<Limit::kPerToken>(p, latent0, bias, bias + kFewLatents);
  };
  float sums[kFewWidth / 8][4];
  few_sums<T>(p, latent0, shared, read_bias, sums);
  if (threadIdx.x / 32 >= kFewStrips || group >= out.groups) return;
  write_keys(p, out, group, sums, bias + threadIdx.x / 32 * kFewWidth);
}

// ---- the selection

// Rows for select_row.cuh: the groups of a token by their highest keys, and the latents of the groups that are left.
struct GroupRow {
  const uint32_t* highest;
  uint32_t total;

  __device__ uint32_t key(uint32_t at) const { return highest[at]; }
  __device__ int32_t latent(uint32_t at) const { return static_cast<int32_t>(at); }
};

struct ChosenRow {
  const uint32_t* keys;
  const int32_t* groups;
  uint32_t total;

  __device__ uint32_t key(uint32_t at) const { return keys[latent(at)]; }
  __device__ int32_t latent(uint32_t at) const {
    return groups[at / kGroup] * kGroup + static_cast<int32_t>(at % kGroup);
  }
};

struct TopkFew {
  FewKeys of;
  int32_t* chosen;  // [n, groups] workspace
  SelectRows best;  // `found` is not read; counts may hold anything
  FillRows fill;    // of `best`
};

// Keeps the groups that can hold one of the k best, in order; returns how many. Their keys go over the highest ones:
// compact() writes no position before it was read.
template <typename KeyAt>
__device__ inline uint32_t keep_groups(const TopkFew& p, int64_t i, const GroupRow& row,
                                       const KeyAt& key_at, KeyRange range, uint32_t* bins,
                                       uint32_t* words) {
  range = find_cut<kTopkFewWarps>(row, key_at, range, static_cast<uint32_t>(p.best.k), bins);
  float* keys = reinterpret_cast<float*>(p.of.highest + i * p.of.groups);
  compact<kTopkFewWarps>(row, key_at, range.low - 1, 0, p.chosen + i * p.of.groups, keys, words);
  Team<kTopkFewWarps>::sync();
  return range.count;
}

// A block per token. kKeys: longest row whose keys stay in shared memory.
template <uint32_t kKeys>
__global__ void __launch_bounds__(32 * kTopkFewWarps) topk_few_kernel(TopkFew p) {
  __shared__ SelectShared<kTopkFewWarps, 1, kKeys> shared;
  uint32_t *const keys = shared.keys[0], *const bins = shared.bins[0],
                  *const words = shared.words[0];
  const auto kept = [keys](uint32_t at) { return keys[at]; };
  const int64_t i = blockIdx.x;
  if (threadIdx.x == 0) p.best.counts[i] = 0;
  if (i == 0 && threadIdx.x == 0) p.fill.offsets[0] = 0;
  const GroupRow all = {p.of.highest + i * p.of.groups, static_cast<uint32_t>(p.of.groups)};
  const bool few = all.total <= kKeys;
  KeyRange range = read_keys<kTopkFewWarps>(all, few ? keys : nullptr, words);
  if (range.count > 0) {
    const auto highest = [&all](uint32_t at) { return all.key(at); };
    const uint32_t groups = few ? keep_groups(p, i, all, kept, range, bins, words)
                                : keep_groups(p, i, all, highest, range, bins, words);
    const ChosenRow row = {p.of.keys + i * p.of.groups * kGroup, p.chosen + i * p.of.groups,
                           groups * kGroup};
    const bool fits = row.total <= kKeys;
    range = read_keys<kTopkFewWarps>(row, fits ? keys : nullptr, words);
    const auto from_memory = [&row](uint32_t at) { return row.key(at); };
    if (fits) {
      select_row<kTopkFewWarps>(p.best, i, row, kept, range, bins, words);
    } else {
      select_row<kTopkFewWarps>(p.best, i, row, from_memory, range, bins, words);
    }
  }
  __syncthreads();  // counts and the best entries, by all threads
  fill_row<kTopkFewWarps>(p.fill, i);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
