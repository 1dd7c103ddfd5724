// TopK encoder on CUDA: the k largest of relu(x @ W_enc + b_enc) per row, without forming the product.
//
//   result(i) = the k largest of relu(pre[i]), NaN largest, ties to the smaller latent, in ascending latent order
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 2.3.
// Algorithm: the latents in growing prefixes (select_prefixes.h); a chunk emits what exceeds the row's k-th best so
// far (encode_tiles.h), and an exact selection per row merges it (select_rows_kernel.cuh).
// The host waits once, where d_sae is more than twice the first prefix, to see whether a chunk overflowed; then those
// rows go on from there in chunks that cannot. While a CUDA graph is captured it does not wait, and their values are
// NaN.
// Bound: the product, 2 n d_in d_sae operations.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/by_feature.h"
#include "cuda/encode_tiles.h"
#include "cuda/runtime.h"
#include "cuda/select_prefixes.h"
#include "cuda/select_rows_kernel.cuh"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "topk_encode";

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// The k best entries of each row so far. Blocks of `together` rows are scanned one after another.
struct Best {
  int64_t n, k, d_sae, width, growth, together;
  Tensor latents, values;  // [n, k]
  Tensor counts, bound;    // [n]
  Tensor lost;             // [blocks]

  Best(const EncodeInputs& in, int64_t k_)
      : n(in.n()),
        k(k_),
        d_sae(in.d_sae()),
        width(first_prefix(n, k)),
        growth(prefix_growth(n, k, width)),
        together(rows_at_once(n, std::min(width, d_sae))) {
    using torch::stable::new_empty;
    latents = new_empty(in.bias, {n, k}, ScalarType::Int);
    values = new_empty(in.bias, {n, k}, ScalarType::Float);
    counts = torch::stable::new_zeros(in.bias, {n}, ScalarType::Int);
    bound = torch::stable::new_zeros(in.bias, {n}, ScalarType::Float);
    lost = new_empty(in.bias, {blocks()}, ScalarType::Long);
    torch::stable::fill_(lost, static_cast<double>(d_sae));
  }

  int64_t blocks() const { return (n + together - 1) / together; }
};

void merge(const Best& best, int64_t begin, int64_t rows, const Found& found, cudaStream_t stream) {
  SelectRows p;
  p.found = found;
  p.n = rows;
  p.k = best.k;
  p.latents = data<int32_t>(best.latents) + begin * best.k;
  p.values = data<float>(best.values) + begin * best.k;
  p.counts = data<int32_t>(best.counts) + begin;
  p.bound = data<float>(best.bound) + begin;
  if (best.width <= kWarpKeys) {
    select_rows_kernel<1, kWarpRows, kWarpKeys>
        <<<grid_of((rows + kWarpRows - 1) / kWarpRows), 32 * kWarpRows, 0, stream>>>(p);
  } else {
    select_rows_kernel<kBlockWarps, 1, kBlockKeys>
        <<<grid_of(rows), 32 * kBlockWarps, 0, stream>>>(p);
  }
  check_launch(kOp);
}

// Merges the latents of `chunk` into the best of one block of rows.
void scan(const EncodeInputs& in, const Best& best, int64_t block, Prefix chunk,
          cudaStream_t stream) {
  const int64_t begin = block * best.together, rows = std::min(best.together, best.n - begin);
  const int64_t capacity = rows * std::min(best.width, best.d_sae);
  const EncodeCsr csr =
      encode_candidates(kOp, in.of_rows(begin, rows), tokens_of(best.bound, begin, rows),
                        chunk.first, chunk.last, capacity, stream);
  Found found;
  found.offsets = data<int64_t>(csr.offsets);
  found.latents = data<int32_t>(csr.indices);
  found.values = data<float>(csr.values);
  found.needed = data<int64_t>(csr.needed);
  found.capacity = capacity;
  found.first = chunk.first;
  found.lost = data<int64_t>(best.lost) + block;
  merge(best, begin, rows, found, stream);
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(kOp, "asking for a capture", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void select(const EncodeInputs& in, const Best& best, cudaStream_t stream) {
  for (int64_t block = 0; block < best.blocks(); ++block) {
    for (const Prefix chunk : prefixes(best.d_sae, best.width, best.growth))
      scan(in, best, block, chunk, stream);
  }
  if (best.d_sae <= 2 * best.width || capturing(stream)) return;
  std::vector<int64_t> lost(static_cast<size_t>(best.blocks()));
  check_cuda(kOp, "reading the overflow flags",
             cudaMemcpyAsync(lost.data(), best.lost.data_ptr(), lost.size() * sizeof(int64_t),
                             cudaMemcpyDeviceToHost, stream));
  check_cuda(kOp, "waiting for the encoder", cudaStreamSynchronize(stream));
  torch::stable::fill_(best.lost, static_cast<double>(best.d_sae));
  for (int64_t block = 0; block < best.blocks(); ++block) {
    const int64_t begin = lost[static_cast<size_t>(block)];
    for (const Prefix chunk : equal_chunks(begin, best.d_sae, best.width)) {
      scan(in, best, block, chunk, stream);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_encode_cuda(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, int64_t k, bool by_feature,
    std::optional<Tensor> packed) {
  static_cast<void>(packed);  // is for CPUs
  check_encode(kOp, x, W_enc, b_enc);
  const int64_t n = x.size(0), d_sae = W_enc.size(1);
  if (k < 0 || k > d_sae) fail(kOp, "k must be in [0, d_sae=", d_sae, "], got ", k);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(kOp, x);
  Tensor offsets = torch::stable::new_zeros(b_enc, {n + 1}, ScalarType::Long);
  Tensor indices = torch::stable::new_empty(b_enc, {n * k}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(b_enc, {n * k}, ScalarType::Float);
  Tensor gate = torch::stable::new_empty(b_enc, {n * k}, ScalarType::Float);
  if (n * k > 0) {
    const EncodeInputs in = encode_inputs(x, W_enc, b_enc);
    const Best best(in, k);
    select(in, best, stream);
    FillRows p;
    p.latents = data<int32_t>(best.latents);
    p.values = data<float>(best.values);
    p.counts = data<int32_t>(best.counts);
    p.lost = data<int64_t>(best.lost);
    p.n = n;
    p.k = k;
    p.d_sae = d_sae;
    p.together = best.together;
    p.offsets = data<int64_t>(offsets);
    p.out_latents = data<int32_t>(indices);
    p.out_values = data<float>(values);
    p.gate = data<float>(gate);
    fill_rows_kernel<<<grid_of((n + 7) / 8), kFillThreads, 0, stream>>>(p);
    check_launch(kOp);
  }
  auto [feature_offsets, permutation] = feature_view_cuda(by_feature, offsets, indices, d_sae);
  return {offsets, indices, values, gate, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("topk_encode", TORCH_BOX(&topk_encode_cuda));
}

}  // namespace gemmascope_fast
