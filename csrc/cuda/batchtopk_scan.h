// The scan of the BatchTopK encoders: latents in growing prefixes (select_prefixes.h), each merged into the best entries
// of the batch (select_batch_kernel.cuh). Where the candidates of a chunk come from is the caller's matter.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "cuda/encode_tiles.h"
#include "cuda/runtime.h"
#include "cuda/select_prefixes.h"

namespace gemmascope_fast {
inline namespace on_cuda {

struct BatchCsr {
  Tensor offsets, latents, values;
};

// The best entries of a batch so far, and what their selection works with. Blocks of `together` rows are scanned one
// after another.
struct BatchBest {
  int64_t n, d_sae, count;     // of `count` entries wanted there are at most n * d_sae
  int64_t room;                // entries
  int64_t width, growth;       // of the first prefix, and from each to the next
  int64_t together, capacity;  // for the candidates of any chunk
  BatchCsr kept, next;
  Tensor bound;      // [n] what a later latent has to exceed
  Tensor threshold;  // scalar: the least of `count` kept entries, 0 where there are fewer
  Tensor lost;       // [blocks]
  Tensor histograms, cuts, above, equal;

  // `like` is on the device.
  BatchBest(const Tensor& like, int64_t n, int64_t d_sae, int64_t wanted);

  int64_t blocks() const { return (n + together - 1) / together; }
  int64_t begin(int64_t block) const { return block * together; }
  int64_t rows(int64_t block) const { return std::min(together, n - begin(block)); }

  // Nothing kept, nothing lost.
  void forget();
};

// Entries of the rows from `begin` on, as many as `bound` has, and of a chunk's latents that exceed their row's bound.
using BatchCandidates =
    std::function<EncodeCsr(int64_t begin, const Tensor& bound, Prefix chunk, int64_t capacity)>;

// Selects among what is kept and entries of the rows of `block`, of latents from `first` on.
void merge(const char* op, BatchBest& best, int64_t block, const EncodeCsr& found, int64_t first,
           cudaStream_t stream);

// All latents. Nothing waits; a chunk that overflows leaves its first latent in `lost`.
void scan_prefixes(const char* op, BatchBest& best, const BatchCandidates& candidates,
                   cudaStream_t stream);

// All latents as one chunk, of what exceeds `least`.
void scan_above(const char* op, BatchBest& best, float least, const BatchCandidates& candidates,
                cudaStream_t stream);

// What chunks lost, `lost` on the host, in chunks that cannot overflow. Returns whether there was any.
bool scan_lost(const char* op, BatchBest& best, const std::vector<int64_t>& lost,
               const BatchCandidates& candidates, cudaStream_t stream);

struct BatchSeen {
  std::vector<int64_t> lost;
  bool whole;  // nothing was lost
  int64_t entries;
  float threshold;
};

// Waits for the device, and for what else is to be read back.
BatchSeen look(const BatchBest& best, Readback& found);
inline BatchSeen look(const char* op, const BatchBest& best, cudaStream_t stream) {
  Readback found(op, stream);
  return look(best, found);
}

// The result; NaN where candidates are lost or do not fit.
EncodeCsr write_entries(const char* op, const BatchBest& best, int64_t capacity,
                        cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
