// BatchTopK encoder on CUDA: the int(k n) largest positive entries of a batch, without forming the product.
//
//   result = the count largest entries of relu(x @ W_enc + b_enc) that are > 0 or NaN, ties by (row, latent)
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: BatchTopK sparse autoencoders, arXiv 2412.06410.
// Algorithm: as topk_encode.cu, with one selection over the batch for all rows (select_batch_kernel.cuh), into which
// the blocks of rows go one after another. A guess of the threshold replaces the prefixes by one chunk, when what
// exceeds it is at least `count` entries and fits.
// The host waits for what a guess found. Without a guess, or after one that failed, it waits once for the number of
// entries (without max_nnz) and for whether a chunk overflowed (d_sae more than twice the first prefix).
// While a CUDA graph is captured (with max_nnz) it does not wait and ignores the guess; lost candidates make all values
// NaN there, and `needed` larger than max_nnz. More entries than max_nnz always do.
// Bound: the product, 2 n d_in d_sae operations.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/by_feature.h"
#include "cuda/encode_tiles.h"
#include "cuda/runtime.h"
#include "cuda/select_batch_kernel.cuh"
#include "cuda/select_prefixes.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "batchtopk_encode";

// A guess of the threshold is lowered by this factor: thresholds drift by a few % per step.
constexpr double kMargin = 0.9;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

struct Csr {
  Tensor offsets, latents, values;
};

// The best entries of a batch so far, and what their selection works with. Blocks of `together` rows are scanned one
// after another.
struct Best {
  int64_t n, d_sae, count;     // of `count` entries wanted there are at most n * d_sae
  int64_t room;                // entries
  int64_t width, growth;       // of the first prefix, and from each to the next
  int64_t together, capacity;  // for the candidates of any chunk
  Csr kept, next;
  Tensor bound, threshold, lost;
  Tensor histograms, cuts, above, equal;

  Best(const EncodeInputs& in, int64_t wanted)
      : n(in.n()), d_sae(in.d_sae()), count(wanted), room(std::min(wanted, n * d_sae)) {
    const int64_t each = n > 0 ? (room + n - 1) / n : 0;
    width = first_prefix(n, each);
    growth = prefix_growth(n, each, width);
    const int64_t chunk = std::min(width, d_sae);
    together = std::max<int64_t>(rows_at_once(n, std::max<int64_t>(chunk, 1)), 1);
    capacity = std::min(together, n) * chunk;
    const auto of = [&](int64_t size, ScalarType dtype) {
      return torch::stable::new_empty(in.bias, {size}, dtype);
    };
    for (Csr* csr : {&kept, &next}) {
      csr->offsets = torch::stable::new_zeros(in.bias, {n + 1}, ScalarType::Long);
      csr->latents = of(room, ScalarType::Int);
      csr->values = of(room, ScalarType::Float);
    }
    bound = torch::stable::new_zeros(in.bias, {n}, ScalarType::Float);
    threshold = torch::stable::new_zeros(in.bias, {}, ScalarType::Float);
    lost = of(blocks(), ScalarType::Long);
    torch::stable::fill_(lost, static_cast<double>(d_sae));
    histograms = of(kBatchLevels * kBatchBins, ScalarType::Long);
    cuts = of(2 * (kBatchLevels + 1), ScalarType::Long);
    above = of(n, ScalarType::Long);
    equal = of(n, ScalarType::Long);
  }

  int64_t blocks() const { return (n + together - 1) / together; }

  // Nothing kept, nothing lost.
  void forget() {
    torch::stable::zero_(kept.offsets);
    torch::stable::zero_(bound);
    torch::stable::fill_(lost, static_cast<double>(d_sae));
  }
};

SelectBatch merge_arguments(const Best& best, int64_t block, const EncodeCsr& csr, int64_t first) {
  SelectBatch p;
  p.found.offsets = data<int64_t>(csr.offsets);
  p.found.latents = data<int32_t>(csr.indices);
  p.found.values = data<float>(csr.values);
  p.found.needed = data<int64_t>(csr.needed);
  p.found.capacity = best.capacity;
  p.found.first = first;
  p.found.lost = data<int64_t>(best.lost) + block;
  p.first_row = block * best.together;
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

void merge(Best& best, int64_t block, const EncodeCsr& csr, int64_t first, cudaStream_t stream) {
  const SelectBatch p = merge_arguments(best, block, csr, first);
  const size_t bytes = sizeof(unsigned long long) * kBatchLevels * kBatchBins;
  check_cuda(kOp, "clearing histograms", cudaMemsetAsync(p.histograms, 0, bytes, stream));
  // Blocks enough to fill the device, few enough that adding up their histograms costs little.
  const unsigned wide = batch_grid(best.room + best.capacity, 512),
                 rows = batch_grid(best.n * 32, 1024);
  for (int level = 0; level < kBatchLevels; ++level) {
    select_batch_histogram_kernel<<<wide, kBatchThreads, 0, stream>>>(p, level);
    check_launch(kOp);
  }
  select_batch_count_kernel<<<rows, kBatchThreads, 0, stream>>>(p);
  check_launch(kOp);
  select_batch_scan_kernel<<<1, kScanThreads, 0, stream>>>(p);
  check_launch(kOp);
  select_batch_place_kernel<<<batch_grid(best.n * 32, 1 << 20), kBatchThreads, 0, stream>>>(p);
  check_launch(kOp);
  std::swap(best.kept, best.next);
}

struct Seen {
  std::vector<int64_t> lost;
  int64_t entries = 0;
};

// Waits for the device.
Seen look(const Best& best, cudaStream_t stream) {
  Seen seen;
  seen.lost.resize(static_cast<size_t>(best.blocks()));
  const auto copy = [&](int64_t* to, const int64_t* from, size_t count) {
    check_cuda(kOp, "reading a size",
               cudaMemcpyAsync(to, from, count * sizeof(*to), cudaMemcpyDeviceToHost, stream));
  };
  copy(seen.lost.data(), data<int64_t>(best.lost), seen.lost.size());
  copy(&seen.entries, data<int64_t>(best.kept.offsets) + best.n, 1);
  check_cuda(kOp, "waiting for the encoder", cudaStreamSynchronize(stream));
  return seen;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(kOp, "asking for a capture", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Merges what latents of `chunk` exceed `bound` in one block of rows.
void scan(const EncodeInputs& in, Best& best, int64_t block, const Tensor& bound, Prefix chunk,
          cudaStream_t stream) {
  const int64_t begin = block * best.together, rows = std::min(best.together, best.n - begin);
  const EncodeCsr csr =
      encode_candidates(kOp, in.of_rows(begin, rows), tokens_of(bound, begin, rows), chunk.first,
                        chunk.last, best.capacity, stream);
  merge(best, block, csr, chunk.first, stream);
}

// Selects among what exceeds a little less than the guessed threshold; false, and nothing kept, if that fails.
bool follow(double guess, const EncodeInputs& in, Best& best, cudaStream_t stream) {
  if (!(guess > 0) || !std::isfinite(guess)) return false;
  const Tensor bound = torch::stable::new_empty(in.bias, {best.n}, ScalarType::Float);
  const double lowered = std::min<double>(kMargin * guess, std::numeric_limits<float>::max());
  torch::stable::fill_(bound, lowered);
  for (int64_t block = 0; block < best.blocks(); ++block) {
    scan(in, best, block, bound, {0, best.d_sae}, stream);
  }
  const Seen seen = look(best, stream);
  const auto whole = [&best](int64_t lost) { return lost >= best.d_sae; };
  if (seen.entries == best.count && std::all_of(seen.lost.begin(), seen.lost.end(), whole)) {
    return true;
  }
  best.forget();
  return false;
}

// The number of entries; 0 without a look at the device where `fixed`, since it is not needed then.
int64_t scan_all(const EncodeInputs& in, Best& best, bool fixed, cudaStream_t stream) {
  for (const Prefix chunk : prefixes(best.d_sae, best.width, best.growth)) {
    for (int64_t block = 0; block < best.blocks(); ++block) {
      scan(in, best, block, best.bound, chunk, stream);
    }
  }
  const bool may_overflow = best.d_sae > 2 * best.width && !capturing(stream);
  if (fixed && !may_overflow) return 0;
  const Seen seen = look(best, stream);
  torch::stable::fill_(best.lost, static_cast<double>(best.d_sae));
  bool again = false;
  for (int64_t block = 0; block < best.blocks(); ++block) {
    const int64_t begin = seen.lost[static_cast<size_t>(block)];
    for (const Prefix chunk : equal_chunks(begin, best.d_sae, best.width)) {
      scan(in, best, block, best.bound, chunk, stream);
      again = true;
    }
  }
  return again && !fixed ? look(best, stream).entries : seen.entries;
}

// k n, cut off where more can never be selected.
int64_t wanted_entries(double k, int64_t n, int64_t d_sae) {
  if (!(k >= 0) || !std::isfinite(k)) fail(kOp, "k must be finite and >= 0, got ", k);
  const double wanted = std::trunc(k * static_cast<double>(n));
  const int64_t all = n * d_sae;
  return wanted > static_cast<double>(all) ? all + 1 : static_cast<int64_t>(wanted);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batchtopk_encode_cuda(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, double k,
    std::optional<double> guess, std::optional<int64_t> max_nnz, bool by_feature,
    std::optional<Tensor> packed) {
  static_cast<void>(packed);  // is for CPUs
  check_encode(kOp, x, W_enc, b_enc);
  if (max_nnz && *max_nnz < 0) fail(kOp, "max_nnz must be >= 0, got ", *max_nnz);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(kOp, x);
  const EncodeInputs in = encode_inputs(x, W_enc, b_enc);
  Best best(in, wanted_entries(k, in.n(), in.d_sae()));
  int64_t entries = 0;
  if (best.room > 0 && guess && !capturing(stream) && follow(*guess, in, best, stream)) {
    entries = best.count;
  } else if (best.room > 0) {
    entries = scan_all(in, best, max_nnz.has_value(), stream);
  }
  WriteBatch p;
  p.capacity = max_nnz.value_or(entries);
  const auto of = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(in.bias, {size}, dtype);
  };
  Tensor offsets = of(best.n + 1, ScalarType::Long), indices = of(p.capacity, ScalarType::Int);
  Tensor values = of(p.capacity, ScalarType::Float), gate = of(p.capacity, ScalarType::Float);
  Tensor needed = torch::stable::new_empty(in.bias, {}, ScalarType::Long);
  p.kept_offsets = data<int64_t>(best.kept.offsets);
  p.kept_latents = data<int32_t>(best.kept.latents);
  p.kept_values = data<float>(best.kept.values);
  p.lost = data<int64_t>(best.lost);
  p.blocks = best.blocks();
  p.n = best.n;
  p.d_sae = best.d_sae;
  p.offsets = data<int64_t>(offsets);
  p.latents = data<int32_t>(indices);
  p.values = data<float>(values);
  p.gate = data<float>(gate);
  p.needed = data<int64_t>(needed);
  write_batch_kernel<<<batch_grid(std::max(best.n + 1, p.capacity), 1 << 20), kBatchThreads, 0,
                       stream>>>(p);
  check_launch(kOp);
  auto [feature_offsets, permutation] = feature_view_cuda(by_feature, offsets, indices, best.d_sae);
  return {offsets, indices, values, gate, needed, best.threshold, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("batchtopk_encode", TORCH_BOX(&batchtopk_encode_cuda));
}

}  // namespace gemmascope_fast
