// The last step of TopK: rows of exactly k entries, in latent order, from the best that there are.
#pragma once

#include <stdint.h>

#include "cuda/select_keys.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Rows of exactly k entries: with m best entries a row takes the k - m smallest other latents, at value 0. Entry e, at
// latent l, has l - e other latents below it, so it lies at e + min(l - e, k - m). The positions left hold fillers, and
// a filler lies at the position that is its own latent: all latents below it are in the row.
struct FillRows {
  const int32_t* latents;  // [n, k]
  const float* values;     // [n, k]
  const int32_t* counts;   // [n]
  // [blocks of `together` rows] below d_sae: the block lost candidates, its values are NaN. Null: none did.
  const int64_t* lost;
  int64_t n, k, d_sae, together;
  const int64_t* which;  // [n] where the rows go, or null: 0, 1, 2, ...
  int64_t* offsets;      // [rows + 1]
  int32_t* out_latents;  // [rows, k]
  float* out_values;     // [rows, k]
  float* gate;           // [rows, k]
};

// One row by one team.
template <int kWarps>
__device__ inline void fill_row(const FillRows& p, int64_t i) {
  const bool lost = p.lost != nullptr && p.lost[i / p.together] < p.d_sae;
  const int64_t m = p.counts[i], thread = Team<kWarps>::thread();
  const int64_t to = p.which == nullptr ? i : p.which[i], row = to * p.k, kept = i * p.k;
  if (thread == 0) p.offsets[to + 1] = row + p.k;
  for (int64_t e = thread; e < p.k && m < p.k; e += Team<kWarps>::kThreads) {
    p.out_latents[row + e] = static_cast<int32_t>(e);
    p.out_values[row + e] = lost ? value_of(kNaNKey) : 0.0f;
    p.gate[row + e] = lost ? 1.0f : 0.0f;
  }
  Team<kWarps>::sync();
  for (int64_t e = thread; e < m; e += Team<kWarps>::kThreads) {
    const int64_t latent = p.latents[kept + e];
    const int64_t target = row + e + min(latent - e, p.k - m);
    p.out_latents[target] = static_cast<int32_t>(latent);
    p.out_values[target] = lost ? value_of(kNaNKey) : p.values[kept + e];
    p.gate[target] = 1.0f;
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
