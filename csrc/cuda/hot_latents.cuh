// The hot latents of a batch, whose gradients are columns of dense products while the others' come from a pass over
// their entries.
//
// An entry costs the pass a row of g and a row of x, 2 (d_out + d_in) bytes; a latent costs the products
// 2 n (3 d_out + 2 d_in) operations however often it fires. Which latents are hot is decided on the device: the panels
// have room for `most` of them, and kernels whose rows nobody needs end at once.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {

constexpr int kHotThreads = 256;
constexpr int kHotTile = 128;  // rows of a panel that are multiplied together
constexpr int kHotTiles = 8;   // at most

// Zeros at first.
struct HotState {
  int32_t candidates;  // latents with at least `fewest` entries
  int32_t chosen;      // rows of the panels, 0 where they are not worth it
  int32_t
      broken;  // a row of g or x is not finite, and 0 * inf would leak into every row of a product
  int32_t unused;
  unsigned long long entries;  // of the latents that have a row
};

struct HotLatents {
  const int64_t* feature_offsets;  // [d_sae + 1]
  int64_t d_sae, capacity;
  int64_t fewest;                // entries of a hot latent, at least 1
  int64_t worth[kHotTiles + 1];  // entries that the products of so many tiles of rows are worth
  int32_t most, most_candidates;
  HotState* state;
  int32_t* candidates;  // [most_candidates], in any order
  int32_t* latents;     // [most], the hottest first
  int32_t* slots;       // [d_sae]: row of this latent, or -1: the pass serves it
};

__device__ inline int hot_rows(const HotState* state) {
  return state->broken != 0 ? 0 : state->chosen;
}

// Whether the products have made the gradients of this latent; slots null: there are none. All loads go at once: the
// pass asks for every latent.
__device__ inline bool is_hot(const int32_t* slots, const HotState* state, int64_t latent) {
  if (kCapability != 90 && kCapability != 0)
    return false;  // only 9.0 splits, and the tests on a CPU
  if (slots == nullptr) return false;
  const uint32_t slot = static_cast<uint32_t>(slots[latent]);
  const int rows = state->chosen, broken = state->broken;
  return (broken == 0) & (slot < static_cast<uint32_t>(rows));
}

// Tokens of a panel's row: whole blocks of 64 columns.
__host__ __device__ constexpr int64_t hot_tokens(int64_t n) { return (n + 63) / 64 * 64; }

}  // namespace gemmascope_fast
