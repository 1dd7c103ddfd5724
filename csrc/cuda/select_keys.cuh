// Selection by rank, device side: order-preserving keys, rows in two parts, compaction of a row in order.
//
// A value that can be selected is positive or NaN; its key is its bits, and NaN has one key, the largest, so that NaNs
// tie. Anything else has key 0 and is never selected. A row is what was kept of earlier latents followed by what a
// chunk of later latents found: its latents ascend, and of equal keys the earlier position is the smaller latent.
#pragma once

#include <stdint.h>

#include "cuda/rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr uint32_t kInfKey = 0x7F800000u;
constexpr uint32_t kNaNKey = 0x7FC00000u;

__device__ inline uint32_t key_of(float value) {
  return value > 0 ? __float_as_uint(value) : value != value ? kNaNKey : 0;
}

__device__ inline float value_of(uint32_t key) { return __uint_as_float(key); }

// The candidates of one chunk of latents, as CSR over its tokens.
struct Found {
  const int64_t* offsets;  // [n + 1]
  const int32_t* latents;  // ascending inside a row, larger than those kept
  const float* values;
  // A chunk that found more than it had room for, and every chunk after it, is as if it had found nothing.
  const int64_t* needed;
  int64_t capacity;
  int64_t first;  // the chunk's first latent
  int64_t* lost;  // `first` of the earliest chunk that lost candidates; starts above every latent
};

// The same for all threads of a merge: `record_loss` may move *lost to `first` in between, never below it.
__device__ inline bool dropped(const Found& found) {
  return *found.needed > found.capacity || *found.lost < found.first;
}

// To be called by one thread of a merge.
__device__ inline void record_loss(const Found& found) {
  if (*found.needed > found.capacity && found.first < *found.lost) *found.lost = found.first;
}

struct Row {
  const int32_t *kept_latents, *found_latents;
  const float *kept_values, *found_values;
  uint32_t kept, total;  // at most the latents of an encoder, so below 2^31

  __device__ uint32_t key(uint32_t at) const {
    return key_of(at < kept ? kept_values[at] : found_values[at - kept]);
  }
  __device__ int32_t latent(uint32_t at) const {
    return at < kept ? kept_latents[at] : found_latents[at - kept];
  }
};

// The threads that share a row: one warp, or a whole block of kWarps warps.
template <int kWarps>
struct Team {
  static constexpr uint32_t kThreads = 32 * kWarps;

  static __device__ uint32_t thread() {
    return kWarps == 1 ? threadIdx.x % 32 : static_cast<uint32_t>(threadIdx.x);
  }
  static __device__ void sync() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Sums of both halves of a word over the lanes below, and over all; each half below 2^16.
struct Ranks {
  uint32_t above, equal;          // how many of each precede this thread's position
  uint32_t all_above, all_equal;  // of the whole team
};

// Two bits per thread, counted over the team. `words` holds kWarps words and alternates between calls.
template <int kWarps>
__device__ inline Ranks rank(bool above, bool equal, uint32_t* words) {
  const uint32_t lane = threadIdx.x % 32, warp = Team<kWarps>::thread() / 32;
  const uint32_t lower = (1u << lane) - 1;
  const uint32_t aboves = __ballot_sync(kAllLanes, above);
  const uint32_t equals = __ballot_sync(kAllLanes, equal);
  Ranks r = {static_cast<uint32_t>(__popc(aboves & lower)),
             static_cast<uint32_t>(__popc(equals & lower)), static_cast<uint32_t>(__popc(aboves)),
             static_cast<uint32_t>(__popc(equals))};
  if constexpr (kWarps > 1) {
    if (lane == 0) words[warp] = r.all_above | r.all_equal << 16;
  }
  Team<kWarps>::sync();
  if constexpr (kWarps > 1) {
    uint32_t before = 0, all = 0;
    for (uint32_t w = 0; w < kWarps; ++w) {
      before += w < warp ? words[w] : 0;
      all += words[w];
    }
    r.above += before & 0xFFFF;
    r.equal += before >> 16;
    r.all_above = all & 0xFFFF;
    r.all_equal = all >> 16;
  }
  return r;
}

// Writes the keys above `cut` and the first `room` of those equal to it, in order; returns the smallest key that this
// thread wrote, or kNaNKey. A position's target is never behind it and its source is read before anything of its step
// is written, so the output may be the row's kept part itself. `words`: 2 kWarps words of shared memory.
template <int kWarps, class Entries, typename KeyAt>
__device__ inline uint32_t compact(const Entries& row, const KeyAt& key_at, uint32_t cut,
                                   uint32_t room, int32_t* latents, float* values,
                                   uint32_t* words) {
  uint32_t smallest = kNaNKey, above_seen = 0, equal_seen = 0, parity = 0;
  for (uint32_t start = 0; start < row.total; start += Team<kWarps>::kThreads) {
    const uint32_t at = start + Team<kWarps>::thread();
    const uint32_t key = at < row.total ? key_at(at) : 0;
    const bool above = key > cut, equal = key == cut && key != 0;
    const int32_t latent = above || equal ? row.latent(at) : 0;
    const Ranks r = rank<kWarps>(above, equal, words + parity * kWarps);
    const uint32_t equal_rank = equal_seen + r.equal;
    if (above || (equal && equal_rank < room)) {
      const uint32_t target = above_seen + r.above + (equal_rank < room ? equal_rank : room);
      latents[target] = latent;
      values[target] = value_of(key);
      smallest = key < smallest ? key : smallest;
    }
    above_seen += r.all_above;
    equal_seen += r.all_equal;
    parity ^= 1;
  }
  return smallest;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
