// The scan of the TopK encoders: latents in growing prefixes (select_prefixes.h), each merged into the best of the rows
// (select_rows_kernel.cuh). Where the candidates of a chunk come from is the caller's matter.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "cuda/encode_tiles.h"
#include "cuda/select_prefixes.h"

namespace gemmascope_fast {
inline namespace on_cuda {

// The k best entries of each row so far. Blocks of `together` rows are scanned one after another.
struct TopkRows {
  int64_t n, k, d_sae, width, growth, together;
  Tensor latents, values;  // [n, k]
  Tensor counts, bound;    // [n]
  Tensor lost;             // [blocks]

  // `like` is on the device.
  TopkRows(const Tensor& like, int64_t n, int64_t d_sae, int64_t k);

  int64_t blocks() const { return (n + together - 1) / together; }
  int64_t begin(int64_t block) const { return block * together; }
  int64_t rows(int64_t block) const { return std::min(together, n - begin(block)); }
};

// Entries of rows [begin, begin + rows) and of a chunk's latents that exceed their rows' bound.
using Candidates =
    std::function<EncodeCsr(int64_t begin, int64_t rows, Prefix chunk, int64_t capacity)>;

// All latents. Nothing waits; a chunk that overflows leaves its first latent in `lost`.
void scan_prefixes(const char* op, const TopkRows& best, const Candidates& candidates,
                   cudaStream_t stream);

// What chunks lost, `lost` on the host, in chunks that cannot overflow. Returns whether there was any.
bool scan_lost(const char* op, const TopkRows& best, const std::vector<int64_t>& lost,
               const Candidates& candidates, cudaStream_t stream);

// Rows of k entries each, as CSR. Row i of `best` becomes row which[i], or row i where `which` is null.
struct TopkCsr {
  Tensor offsets;          // [n + 1]
  Tensor indices, values;  // [n k]
  Tensor gate;             // [n k]
};
void fill_rows(const char* op, const TopkRows& best, const int64_t* which, const TopkCsr& out,
               cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
