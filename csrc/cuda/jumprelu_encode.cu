// JumpReLU encoder on CUDA: the entries of pre = x @ W_enc + b_enc that pass a threshold, as CSR.
//
//   entry (i, j) when pre > threshold[j] (value pre, gate 1)
//   or, with bandwidth > 0, when pre > threshold[j] - bandwidth / 2 (value 0, gate 0)
//   x [n, d_in], W_enc [d_in, d_sae], b_enc and threshold [d_sae]
//
// Source: JumpReLU SAEs, arXiv 2407.14435, section 3.
// Algorithm: encode_tiles.h. The host waits once, for the size of the result; with max_nnz it does not wait, and more
// entries than that make every value NaN (indices 0, gate 1).
// Bound: the product, 2 n d_in d_sae operations.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/by_feature.h"
#include "cuda/encode_screened.h"
#include "cuda/encode_tiles.h"
#include "cuda/last_sizes.h"
#include "cuda/runtime.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "jumprelu_encode";

// Records that the arena of a first call has room for: 1 to 8 KiB per token, 0.8 % of pre in bfloat16 from 65,536 latents
// on. The strips whose records did not fit are the last ones that ran, and are computed again.
int64_t first_arena(int64_t n, int64_t d_sae) {
  const int64_t per_token = std::min<int64_t>(std::max<int64_t>(d_sae / 512, 128), 1024);
  return std::max<int64_t>(per_token * n, 65536);
}

void check_arguments(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc,
                     const Tensor& threshold, double bandwidth, std::optional<int64_t> max_nnz) {
  check_encode(kOp, x, W_enc, b_enc);
  check_dtype(kOp, "threshold", threshold, ScalarType::Float);
  check_shape(kOp, "threshold", threshold, {W_enc.size(1)});
  if (!threshold.is_cuda() || threshold.get_device_index() != x.get_device_index()) {
    fail(kOp, "threshold must be on the device of x");
  }
  constexpr double largest = std::numeric_limits<float>::max();
  if (!(bandwidth >= 0 && bandwidth <= largest)) {
    fail(kOp, "bandwidth must be in [0, ", largest, "], got ", bandwidth);
  }
  if (max_nnz && *max_nnz < 0) fail(kOp, "max_nnz must be >= 0, got ", *max_nnz);
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result with_view(const EncodeCsr& out, bool by_feature, int64_t d_sae) {
  auto [feature_offsets, permutation] =
      feature_view_cuda(by_feature, out.offsets, out.indices, d_sae);
  return {out.offsets, out.indices, out.values, out.gate, out.needed, feature_offsets, permutation};
}

// The array itself, with less of its memory in use: a view would let nobody write to it in place.
Tensor shortened(const Tensor& t, int64_t size) {
  if (t.size(0) <= size) return t;
  const std::vector<int64_t> sizes = {size};
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(t),
      torch::stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(sizes)),
      torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::resize_", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A result whose arrays have room for more than its entries.
Result first_entries(const Result& result, int64_t entries) {
  const auto& [offsets, indices, values, gate, needed, feature_offsets, permutation] = result;
  return {offsets,
          shortened(indices, entries),
          shortened(values, entries),
          shortened(gate, entries),
          needed,
          feature_offsets,
          shortened(permutation, entries)};
}

LastSizes& last_sizes() {
  static LastSizes& sizes = *new LastSizes;  // threads may outlive what is destroyed at exit
  return sizes;
}

// The result, of a size that the host waits for once. Where an earlier call tells about how large it will be, the
// entries are placed and sorted meanwhile, in that room; what the first arena had no room for is computed again.
Result exact_result(EncodeHits& hits, const LastSizes::Call& call, int64_t room, bool by_feature,
                    cudaStream_t stream) {
  const auto result = [&](int64_t capacity) {
    return with_view(place_hits(kOp, hits, capacity, true, stream), by_feature, call.d_sae);
  };
  LastSizes::Sizes found = {0, 0};
  Readback sizes(kOp, stream);
  sizes.read(&found.records, hits.reserved(), sizeof(found.records));
  sizes.read(&found.entries, data<int64_t>(hits.offsets) + call.n, sizeof(found.entries));
  std::optional<Result> early;
  if (room > 0) {
    sizes.end();
    early = result(room);
  }
  sizes.wait();
  last_sizes().keep(call, found);
  const bool complete = found.records <= static_cast<int64_t>(hits.tiles.arena);
  if (complete && early && LastSizes::fits(found.entries, room)) {
    return first_entries(*early, found.entries);
  }
  early.reset();
  if (!complete) encode_missing(kOp, hits, found.records, stream);
  return result(found.entries);
}

}  // namespace

Result jumprelu_encode_cuda(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc,
                            const Tensor& threshold, double bandwidth,
                            std::optional<int64_t> max_nnz, bool by_feature,
                            std::optional<Tensor> packed) {
  check_arguments(x, W_enc, b_enc, threshold, bandwidth, max_nnz);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(kOp, x);
  EncodeLimit limit;
  limit.kind = Limit::kPerLatent;
  limit.values = torch::stable::contiguous(threshold);
  limit.window = bandwidth > 0 ? static_cast<float>(bandwidth / 2) : 0.0f;
  if (packed) {
    const auto out = jumprelu_screened(kOp, x, W_enc, torch::stable::contiguous(b_enc),
                                       limit.values, limit.window, max_nnz, *packed, stream);
    if (out) return with_view(*out, by_feature, W_enc.size(1));
  }
  const EncodeInputs in = encode_inputs(x, W_enc, b_enc);
  const int64_t n = in.n(), d_sae = in.d_sae();
  limit.first = 0;
  limit.last = d_sae;
  if (max_nnz) {
    EncodeHits hits = encode_hits(kOp, in, limit, std::min(*max_nnz, n * d_sae), stream);
    return with_view(place_hits(kOp, hits, *max_nnz, false, stream), by_feature, d_sae);
  }
  const LastSizes::Call call = {W_enc.data_ptr(), n, d_sae, limit.window};
  const LastSizes::Sizes room = last_sizes().room(call);
  const int64_t arena = std::min(std::max(first_arena(n, d_sae), room.records), n * d_sae);
  EncodeHits hits = encode_hits(kOp, in, limit, arena, stream);
  return exact_result(hits, call, room.entries, by_feature, stream);
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("jumprelu_encode", TORCH_BOX(&jumprelu_encode_cuda));
}

}  // namespace gemmascope_fast
