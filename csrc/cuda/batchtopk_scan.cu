#include <torch/csrc/stable/ops.h>

#include "cuda/batchtopk_scan.h"
#include "cuda/runtime.h"
#include "cuda/select_batch_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

Found found_of(const BatchBest& best, int64_t block, const EncodeCsr& csr, int64_t first) {
  Found found;
  found.offsets = data<int64_t>(csr.offsets);
  found.latents = data<int32_t>(csr.indices);
  found.values = data<float>(csr.values);
  found.needed = data<int64_t>(csr.needed);
  found.capacity = csr.indices.size(0);
  found.first = first;
  found.lost = data<int64_t>(best.lost) + block;
  return found;
}

SelectBatch merge_arguments(const BatchBest& best, int64_t block, const EncodeCsr& csr,
                            int64_t first) {
  SelectBatch p;
  p.found = found_of(best, block, csr, first);
  p.first_row = best.begin(block);
  p.rows = csr.offsets.size(0) - 1;
  p.n = best.n;
  p.rank = best.count;
  p.kept_offsets = data<int64_t>(best.kept.offsets);
  p.kept_latents = data<int32_t>(best.kept.latents);
  p.kept_values = data<float>(best.kept.values);
  p.histograms = data<unsigned long long>(best.histograms);
  p.cuts = data<BatchCut>(best.cuts);
  p.above = data<int64_t>(best.above);
  p.equal = data<int64_t>(best.equal);
  p.offsets = data<int64_t>(best.next.offsets);
  p.latents = data<int32_t>(best.next.latents);
  p.values = data<float>(best.next.values);
  p.bound = data<float>(best.bound);
  p.threshold = data<float>(best.threshold);
  return p;
}

// Merges the latents of `chunk` that exceed `bound` in one block of rows.
void scan(const char* op, BatchBest& best, int64_t block, const Tensor& bound, Prefix chunk,
          const BatchCandidates& candidates, cudaStream_t stream) {
  const int64_t begin = best.begin(block);
  const Tensor least = tokens_of(bound, begin, best.rows(block));
  merge(op, best, block, candidates(begin, least, chunk, best.capacity), chunk.first, stream);
}

}  // namespace

BatchBest::BatchBest(const Tensor& like, int64_t n_, int64_t d_sae_, int64_t wanted)
    : n(n_), d_sae(d_sae_), count(wanted), room(std::min(wanted, n * d_sae)) {
  const int64_t each = n > 0 ? (room + n - 1) / n : 0;
  width = first_prefix(n, each);
  growth = prefix_growth(n, each, width);
  const int64_t chunk = std::min(width, d_sae);
  together = std::max<int64_t>(rows_at_once(n, std::max<int64_t>(chunk, 1)), 1);
  capacity = std::min(together, n) * chunk;
  const auto of = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(like, {size}, dtype);
  };
  for (BatchCsr* csr : {&kept, &next}) {
    csr->offsets = torch::stable::new_zeros(like, {n + 1}, ScalarType::Long);
    csr->latents = of(room, ScalarType::Int);
    csr->values = of(room, ScalarType::Float);
  }
  bound = torch::stable::new_zeros(like, {n}, ScalarType::Float);
  threshold = torch::stable::new_zeros(like, {}, ScalarType::Float);
  lost = of(blocks(), ScalarType::Long);
  torch::stable::fill_(lost, static_cast<double>(d_sae));
  histograms = of(kBatchLevels * kBatchBins, ScalarType::Long);
  cuts = of(2 * (kBatchLevels + 1), ScalarType::Long);
  above = of(n, ScalarType::Long);
  equal = of(n, ScalarType::Long);
}

void BatchBest::forget() {
  torch::stable::zero_(kept.offsets);
  torch::stable::zero_(bound);
  torch::stable::fill_(lost, static_cast<double>(d_sae));
}

void merge(const char* op, BatchBest& best, int64_t block, const EncodeCsr& found, int64_t first,
           cudaStream_t stream) {
  const SelectBatch p = merge_arguments(best, block, found, first);
  const size_t bytes = sizeof(unsigned long long) * kBatchLevels * kBatchBins;
  check_cuda(op, "clearing histograms", cudaMemsetAsync(p.histograms, 0, bytes, stream));
  // Blocks enough to fill the device, few enough that adding up their histograms costs little.
  const unsigned wide = batch_grid(best.room + p.found.capacity, 512),
                 rows = batch_grid(best.n * 32, 1024);
  for (int level = 0; level < kBatchLevels; ++level) {
    select_batch_histogram_kernel<<<wide, kBatchThreads, 0, stream>>>(p, level);
    check_launch(op);
  }
  select_batch_count_kernel<<<rows, kBatchThreads, 0, stream>>>(p);
  check_launch(op);
  select_batch_scan_kernel<<<1, kScanThreads, 0, stream>>>(p);
  check_launch(op);
  select_batch_place_kernel<<<batch_grid(best.n * 32, 1 << 20), kBatchThreads, 0, stream>>>(p);
  check_launch(op);
  std::swap(best.kept, best.next);
}

void scan_prefixes(const char* op, BatchBest& best, const BatchCandidates& candidates,
                   cudaStream_t stream) {
  for (const Prefix chunk : prefixes(best.d_sae, best.width, best.growth)) {
    for (int64_t block = 0; block < best.blocks(); ++block) {
      scan(op, best, block, best.bound, chunk, candidates, stream);
    }
  }
}

void scan_above(const char* op, BatchBest& best, float least, const BatchCandidates& candidates,
                cudaStream_t stream) {
  const Tensor bound = torch::stable::new_empty(best.bound, {best.n}, ScalarType::Float);
  torch::stable::fill_(bound, least);
  for (int64_t block = 0; block < best.blocks(); ++block) {
    scan(op, best, block, bound, {0, best.d_sae}, candidates, stream);
  }
}

bool scan_lost(const char* op, BatchBest& best, const std::vector<int64_t>& lost,
               const BatchCandidates& candidates, cudaStream_t stream) {
  bool again = false;
  torch::stable::fill_(best.lost, static_cast<double>(best.d_sae));
  for (int64_t block = 0; block < best.blocks(); ++block) {
    const int64_t begin = lost[static_cast<size_t>(block)];
    for (const Prefix chunk : equal_chunks(begin, best.d_sae, best.width)) {
      scan(op, best, block, best.bound, chunk, candidates, stream);
      again = true;
    }
  }
  return again;
}

BatchSeen look(const BatchBest& best, Readback& found) {
  BatchSeen seen = {};
  seen.lost.resize(static_cast<size_t>(best.blocks()));
  found.read(seen.lost.data(), best.lost.data_ptr(), seen.lost.size() * sizeof(int64_t));
  found.read(&seen.entries, data<int64_t>(best.kept.offsets) + best.n, sizeof(seen.entries));
  found.read(&seen.threshold, best.threshold.data_ptr(), sizeof(seen.threshold));
  found.wait();
  seen.whole = std::all_of(seen.lost.begin(), seen.lost.end(),
                           [&best](int64_t lost) { return lost >= best.d_sae; });
  return seen;
}

EncodeCsr write_entries(const char* op, const BatchBest& best, int64_t capacity,
                        cudaStream_t stream) {
  EncodeCsr out;
  const auto of = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(best.bound, {size}, dtype);
  };
  out.offsets = of(best.n + 1, ScalarType::Long);
  out.indices = of(capacity, ScalarType::Int);
  out.values = of(capacity, ScalarType::Float);
  out.gate = of(capacity, ScalarType::Float);
  out.needed = torch::stable::new_empty(best.bound, {}, ScalarType::Long);
  WriteBatch p;
  p.capacity = capacity;
  p.kept_offsets = data<int64_t>(best.kept.offsets);
  p.kept_latents = data<int32_t>(best.kept.latents);
  p.kept_values = data<float>(best.kept.values);
  p.lost = data<int64_t>(best.lost);
  p.blocks = best.blocks();
  p.n = best.n;
  p.d_sae = best.d_sae;
  p.offsets = data<int64_t>(out.offsets);
  p.latents = data<int32_t>(out.indices);
  p.values = data<float>(out.values);
  p.gate = data<float>(out.gate);
  p.needed = data<int64_t>(out.needed);
  const unsigned blocks = batch_grid(std::max(best.n + 1, capacity), 1 << 20);
  write_batch_kernel<<<blocks, kBatchThreads, 0, stream>>>(p);
  check_launch(op);
  return out;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
