// by_feature on the CPU: the feature-major view of CSR entries.
//
//   indices [capacity] -> feature_offsets [d_sae + 1], permutation [capacity] (positions sorted by latent, stable)
//
// A counting sort: count each latent, prefix-sum, place positions in ascending order. With many entries the positions
// are cut into chunks, one histogram each; the exclusive sums over (latent, chunk) give every chunk its own cursors, so
// the result is the unique stable one for any number of chunks. Bound by the random writes of the placement.
#include "cpu/by_feature.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "cpu/entries.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "by_feature";

// offsets[j + 1] serves as latent j's cursor: it starts at the latent's first slot and ends at its last plus one, which
// is the value it must have. No workspace.
void sort_one_chunk(const int32_t* latents, int64_t nnz, int64_t d_sae, int64_t* offsets,
                    int64_t* permutation) {
  std::memset(offsets, 0, static_cast<size_t>(d_sae + 1) * sizeof(int64_t));
  for (int64_t e = 0; e < nnz; ++e) ++offsets[latents[e] + 1];
  int64_t start = 0;
  for (int64_t j = 0; j < d_sae; ++j) {
    const int64_t count = offsets[j + 1];
    offsets[j + 1] = start;
    start += count;
  }
  for (int64_t e = 0; e < nnz; ++e) permutation[offsets[latents[e] + 1]++] = e;
}

// cursors [chunks][d_sae]: counts, then the first slot of each (latent, chunk).
void exclusive_sums(int64_t* cursors, int64_t chunks, int64_t d_sae, int64_t* offsets) {
  int64_t start = 0;
  for (int64_t j = 0; j < d_sae; ++j) {
    offsets[j] = start;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t count = cursors[c * d_sae + j];
      cursors[c * d_sae + j] = start;
      start += count;
    }
  }
  offsets[d_sae] = start;
}

void sort_chunks(const int32_t* latents, int64_t nnz, int64_t d_sae, int64_t chunks,
                 int64_t* offsets, int64_t* permutation) {
  std::vector<int64_t> cursors(static_cast<size_t>(chunks * d_sae));
  parallel_tasks(chunks, [&](int64_t c, int64_t) {
    int64_t* counts = cursors.data() + c * d_sae;
    for (int64_t e = nnz * c / chunks; e < nnz * (c + 1) / chunks; ++e) ++counts[latents[e]];
  });
  exclusive_sums(cursors.data(), chunks, d_sae, offsets);
  parallel_tasks(chunks, [&](int64_t c, int64_t) {
    int64_t* cursor = cursors.data() + c * d_sae;
    for (int64_t e = nnz * c / chunks; e < nnz * (c + 1) / chunks; ++e) {
      permutation[cursor[latents[e]]++] = e;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> by_feature_cpu(const Tensor& offsets, const Tensor& indices,
                                          int64_t d_sae) {
  const Entries entries = check_entries(kOp, offsets, indices, d_sae);
  Tensor feature_offsets = new_tensor(offsets, {d_sae + 1}, ScalarType::Long);
  Tensor permutation = new_tensor(offsets, {entries.capacity}, ScalarType::Long);
  auto* starts = static_cast<int64_t*>(feature_offsets.data_ptr());
  auto* positions = static_cast<int64_t*>(permutation.data_ptr());
  // A histogram pays when it is shorter than half of the chunk it counts; it also bounds the workspace by nnz / 2.
  const int64_t chunks = parallel_slots(entries.nnz / (2 * d_sae + 32768));
  if (chunks > 1) {
    sort_chunks(entries.indices, entries.nnz, d_sae, chunks, starts, positions);
  } else {
    sort_one_chunk(entries.indices, entries.nnz, d_sae, starts, positions);
  }
  std::fill(positions + entries.nnz, positions + entries.capacity, int64_t{0});
  return {feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, by_feature_cpu); }

}  // namespace gemmascope_fast
