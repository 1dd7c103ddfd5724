// BatchTopK encoder on CUDA: the int(k n) largest positive entries of a batch, without forming the product.
//
//   result = the count largest entries of relu(x @ W_enc + b_enc) that are > 0 or NaN, ties by (row, latent)
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: BatchTopK sparse autoencoders, arXiv 2412.06410.
// Algorithm: as topk_encode.cu, with one selection over the batch for all rows (select_batch_kernel.cuh), into which
// the blocks of rows go one after another. A guess of the threshold replaces the prefixes by one chunk, when what
// exceeds it is at least `count` entries and fits. With `packed` codes int8 products do so for the most that an entry
// can be, and exact sums decide among those that are left (batchtopk_screened.h).
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

#include "cuda/batchtopk_scan.h"
#include "cuda/batchtopk_screened.h"
#include "cuda/by_feature.h"
#include "cuda/encode_tiles.h"
#include "cuda/runtime.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "batchtopk_encode";

// A guess of the threshold is lowered by this factor: thresholds drift by a few % per step.
constexpr double kMargin = 0.9;

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(kOp, "asking for a capture", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// A little less than a guessed threshold, where it can be one.
std::optional<float> lowered(std::optional<double> guess) {
  if (!guess || !(*guess > 0) || !std::isfinite(*guess)) return std::nullopt;
  constexpr double most = std::numeric_limits<float>::max();
  return static_cast<float>(std::min(kMargin * *guess, most));
}

// Selects among what exceeds `least`; false, and nothing kept, if that fails.
bool follow(float least, BatchBest& best, const BatchCandidates& candidates, cudaStream_t stream) {
  scan_above(kOp, best, least, candidates, stream);
  const BatchSeen seen = look(kOp, best, stream);
  if (seen.whole && seen.entries == best.count) return true;
  best.forget();
  return false;
}

// The number of entries; 0 without a look at the device where `fixed`, since it is not needed then.
int64_t scan_all(BatchBest& best, bool fixed, const BatchCandidates& candidates,
                 cudaStream_t stream) {
  scan_prefixes(kOp, best, candidates, stream);
  const bool may_overflow = best.d_sae > 2 * best.width && !capturing(stream);
  if (fixed && !may_overflow) return 0;
  const BatchSeen seen = look(kOp, best, stream);
  const bool again = scan_lost(kOp, best, seen.lost, candidates, stream);
  return again && !fixed ? look(kOp, best, stream).entries : seen.entries;
}

int64_t encode_plain(const EncodeInputs& in, std::optional<float> least, bool fixed,
                     BatchBest& best, cudaStream_t stream) {
  const BatchCandidates candidates = [&](int64_t begin, const Tensor& bound, Prefix chunk,
                                         int64_t capacity) {
    return encode_candidates(kOp, in.of_rows(begin, bound.size(0)), bound, chunk.first, chunk.last,
                             capacity, stream);
  };
  if (least && !capturing(stream) && follow(*least, best, candidates, stream)) return best.count;
  return scan_all(best, fixed, candidates, stream);
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
  check_encode(kOp, x, W_enc, b_enc);
  if (max_nnz && *max_nnz < 0) fail(kOp, "max_nnz must be >= 0, got ", *max_nnz);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(kOp, x);
  const int64_t n = x.size(0), d_sae = W_enc.size(1);
  const Tensor bias = torch::stable::contiguous(b_enc);
  BatchBest best(bias, n, d_sae, wanted_entries(k, n, d_sae));
  const std::optional<float> least = lowered(guess);
  std::optional<int64_t> entries;
  if (best.room == 0) entries = 0;
  if (!entries && packed) {
    entries = batchtopk_screened(kOp, x, W_enc, bias, least, *packed, best, stream);
  }
  if (!entries) {
    const EncodeInputs in = encode_inputs(x, W_enc, bias);
    entries = encode_plain(in, least, max_nnz.has_value(), best, stream);
  }
  const EncodeCsr out = write_entries(kOp, best, max_nnz.value_or(*entries), stream);
  auto [feature_offsets, permutation] =
      feature_view_cuda(by_feature, out.offsets, out.indices, d_sae);
  return {out.offsets, out.indices,    out.values,      out.gate,
          out.needed,  best.threshold, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("batchtopk_encode", TORCH_BOX(&batchtopk_encode_cuda));
}

}  // namespace gemmascope_fast
