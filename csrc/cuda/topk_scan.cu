#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cuda/runtime.h"
#include "cuda/select_rows_kernel.cuh"
#include "cuda/topk_scan.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

void merge(const char* op, const TopkRows& best, int64_t block, const Found& found,
           cudaStream_t stream) {
  const int64_t begin = best.begin(block);
  SelectRows p;
  p.found = found;
  p.n = best.rows(block);
  p.k = best.k;
  p.latents = data<int32_t>(best.latents) + begin * best.k;
  p.values = data<float>(best.values) + begin * best.k;
  p.counts = data<int32_t>(best.counts) + begin;
  p.bound = data<float>(best.bound) + begin;
  if (best.width <= kWarpKeys) {
    select_rows_kernel<1, kWarpRows, kWarpKeys>
        <<<grid_of((p.n + kWarpRows - 1) / kWarpRows), 32 * kWarpRows, 0, stream>>>(p);
  } else {
    select_rows_kernel<kBlockWarps, 1, kBlockKeys>
        <<<grid_of(p.n), 32 * kBlockWarps, 0, stream>>>(p);
  }
  check_launch(op);
}

// Merges the latents of `chunk` into the best of one block of rows.
void scan(const char* op, const TopkRows& best, int64_t block, Prefix chunk,
          const Candidates& candidates, cudaStream_t stream) {
  const int64_t rows = best.rows(block), capacity = rows * std::min(best.width, best.d_sae);
  const EncodeCsr csr = candidates(best.begin(block), rows, chunk, capacity);
  Found found;
  found.offsets = data<int64_t>(csr.offsets);
  found.latents = data<int32_t>(csr.indices);
  found.values = data<float>(csr.values);
  found.needed = data<int64_t>(csr.needed);
  found.capacity = capacity;
  found.first = chunk.first;
  found.lost = data<int64_t>(best.lost) + block;
  merge(op, best, block, found, stream);
}

}  // namespace

TopkRows::TopkRows(const Tensor& like, int64_t n_, int64_t d_sae_, int64_t k_)
    : n(n_),
      k(k_),
      d_sae(d_sae_),
      width(first_prefix(n, k)),
      growth(prefix_growth(n, k, width)),
      together(rows_at_once(n, std::min(width, d_sae))) {
  using torch::stable::new_empty;
  latents = new_empty(like, {n, k}, ScalarType::Int);
  values = new_empty(like, {n, k}, ScalarType::Float);
  counts = torch::stable::new_zeros(like, {n}, ScalarType::Int);
  bound = torch::stable::new_zeros(like, {n}, ScalarType::Float);
  lost = new_empty(like, {blocks()}, ScalarType::Long);
  torch::stable::fill_(lost, static_cast<double>(d_sae));
}

void scan_prefixes(const char* op, const TopkRows& best, const Candidates& candidates,
                   cudaStream_t stream) {
  for (int64_t block = 0; block < best.blocks(); ++block) {
    for (const Prefix chunk : prefixes(best.d_sae, best.width, best.growth)) {
      scan(op, best, block, chunk, candidates, stream);
    }
  }
}

bool scan_lost(const char* op, const TopkRows& best, const std::vector<int64_t>& lost,
               const Candidates& candidates, cudaStream_t stream) {
  bool again = false;
  Tensor flags = best.lost;
  torch::stable::fill_(flags, static_cast<double>(best.d_sae));
  for (int64_t block = 0; block < best.blocks(); ++block) {
    const int64_t begin = lost[static_cast<size_t>(block)];
    for (const Prefix chunk : equal_chunks(begin, best.d_sae, best.width)) {
      scan(op, best, block, chunk, candidates, stream);
      again = true;
    }
  }
  return again;
}

void fill_rows(const char* op, const TopkRows& best, const int64_t* which, const TopkCsr& out,
               cudaStream_t stream) {
  FillRows p;
  p.latents = data<int32_t>(best.latents);
  p.values = data<float>(best.values);
  p.counts = data<int32_t>(best.counts);
  p.lost = data<int64_t>(best.lost);
  p.n = best.n;
  p.k = best.k;
  p.d_sae = best.d_sae;
  p.together = best.together;
  p.which = which;
  p.offsets = data<int64_t>(out.offsets);
  p.out_latents = data<int32_t>(out.indices);
  p.out_values = data<float>(out.values);
  p.gate = data<float>(out.gate);
  fill_rows_kernel<<<grid_of((p.n + 7) / 8), kFillThreads, 0, stream>>>(p);
  check_launch(op);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
