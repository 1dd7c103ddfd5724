// TopK encoder on CUDA: the k largest of relu(x @ W_enc + b_enc) per row.
//
//   result(i) = the k largest of relu(pre[i]), NaN largest, ties to the smaller latent, in ascending latent order
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 2.3.
// Algorithm: the latents in growing prefixes (select_prefixes.h); a chunk emits what exceeds the row's k-th best so
// far (encode_tiles.h), and an exact selection per row merges it (select_rows_kernel.cuh). With `packed` codes int8
// products do so for the most that an entry can be, and exact sums decide among those that are left (topk_screened.h).
// Where x and W_enc are 16-bit, at most 16 tokens have all keys of the product written, and selected from (topk_few.h).
// Else the host waits once, where d_sae is more than twice the first prefix, to see whether a chunk overflowed; then those
// rows go on from there in chunks that cannot. While a CUDA graph is captured it does not wait, and their values are
// NaN.
// Bound: the product, 2 n d_in d_sae operations.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/by_feature.h"
#include "cuda/encode_tiles.h"
#include "cuda/runtime.h"
#include "cuda/topk_few.h"
#include "cuda/topk_scan.h"
#include "cuda/topk_screened.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "topk_encode";

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(kOp, "asking for a capture", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The k best of each row by the plain product, to the rows `which` of `out` (fill_rows).
void encode_plain(const EncodeInputs& in, int64_t k, const int64_t* which, const TopkCsr& out,
                  cudaStream_t stream) {
  if (topk_few_serves(in)) return topk_few(kOp, in, k, which, out, stream);
  const TopkRows best(in.bias, in.n(), in.d_sae(), k);
  const Candidates candidates = [&](int64_t begin, int64_t rows, Prefix chunk, int64_t capacity) {
    return encode_candidates(kOp, in.of_rows(begin, rows), tokens_of(best.bound, begin, rows),
                             chunk.first, chunk.last, capacity, stream);
  };
  scan_prefixes(kOp, best, candidates, stream);
  if (best.d_sae > 2 * best.width && !capturing(stream)) {
    std::vector<int64_t> lost(static_cast<size_t>(best.blocks()));
    Readback flags(kOp, stream);
    flags.read(lost.data(), best.lost.data_ptr(), lost.size() * sizeof(int64_t));
    flags.wait();
    scan_lost(kOp, best, lost, candidates, stream);
  }
  fill_rows(kOp, best, which, out, stream);
}

void encode(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, int64_t k,
            const std::optional<Tensor>& packed, const TopkCsr& out, cudaStream_t stream) {
  std::optional<UnsureRows> unsure;
  if (packed) {
    const Tensor bias = torch::stable::contiguous(b_enc);
    unsure = topk_screened(kOp, x, W_enc, bias, k, *packed, out, stream);
    if (unsure && unsure->count == 0) return;
  }
  const EncodeInputs in = encode_inputs(x, W_enc, b_enc);
  if (!unsure) return encode_plain(in, k, nullptr, out, stream);
  const int64_t* which = static_cast<const int64_t*>(unsure->which.data_ptr());
  encode_plain(gather_rows(kOp, in, *unsure, stream), k, which, out, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_encode_cuda(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, int64_t k, bool by_feature,
    std::optional<Tensor> packed) {
  check_encode(kOp, x, W_enc, b_enc);
  const int64_t n = x.size(0), d_sae = W_enc.size(1);
  if (k < 0 || k > d_sae) fail(kOp, "k must be in [0, d_sae=", d_sae, "], got ", k);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(kOp, x);
  TopkCsr out;
  out.offsets = torch::stable::new_zeros(b_enc, {n + 1}, ScalarType::Long);
  out.indices = torch::stable::new_empty(b_enc, {n * k}, ScalarType::Int);
  out.values = torch::stable::new_empty(b_enc, {n * k}, ScalarType::Float);
  out.gate = torch::stable::new_empty(b_enc, {n * k}, ScalarType::Float);
  if (n * k > 0) encode(x, W_enc, b_enc, k, packed, out, stream);
  auto [feature_offsets, permutation] =
      feature_view_cuda(by_feature, out.offsets, out.indices, d_sae);
  return {out.offsets, out.indices, out.values, out.gate, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("topk_encode", TORCH_BOX(&topk_encode_cuda));
}

}  // namespace gemmascope_fast
