// encode_backward on CUDA, with d_pre[e] = d_values[e] gate[e].
//
//   d_x[i] = sum_e d_pre[e] W_enc[:, j],  d_W_enc[:, j] = sum_e d_pre[e] x[i],  d_b_enc[j] = sum_e d_pre[e],
//   d_threshold[j] = -(1 / bandwidth) sum_e in_window[e] (threshold[j] d_values[e] + d_gate[e])
//
// d_x is a sum in token order, the gradients of parameters are one feature-major pass (arXiv 2407.14435, section 3).
// Dense products take over where they pay (dense_products.h). Never waits. Bound by reading nnz rows of W_enc and
// of x, and by writing d_W_enc.
#include <torch/csrc/stable/library.h>

#include "cuda/dense_products.h"
#include "cuda/feature_pass.h"
#include "cuda/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "encode_backward";

Tensor check_threshold(const std::optional<Tensor>& threshold, double bandwidth, int64_t d_sae,
                       const Tensor& like) {
  if (!threshold.has_value()) fail(kOp, "need_threshold: threshold must be given");
  if (!(bandwidth > 0)) {
    fail(kOp, "bandwidth must be > 0 for the threshold's gradient, got ", bandwidth,
         "; pass a bandwidth or detach the threshold");
  }
  return vector_of(kOp, "threshold", *threshold, ScalarType::Float, d_sae, like);
}

Tensor input_gradient(const DeviceEntries& entries, const std::optional<Tensor>& d_values,
                      const Tensor& gate, const Tensor& x, const Tensor& W_enc) {
  Tensor d_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  sum_tokens_cuda(kOp, {&entries, floats(d_values), floats(gate), transposed(W_enc)}, d_x);
  return d_x;
}

std::vector<DenseWork> works(const DeviceEntries& entries, const Tensor& x, const Tensor& W_enc,
                             bool need_x, bool need_W_enc) {
  std::vector<DenseWork> found;
  if (need_x) {
    found.push_back(
        sum_work(Walk::kTokens, entries.capacity, entries.n, transposed(W_enc), dtype_of(x)));
  }
  if (need_W_enc) {
    found.push_back(sum_work(Walk::kLatents, entries.capacity, W_enc.size(1), x, dtype_of(W_enc)));
  }
  return found;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_backward_cuda(
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& x,
    const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth, const Tensor& offsets,
    const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> feature_offsets, std::optional<Tensor> permutation, bool need_x,
    bool need_W_enc, bool need_b_enc, bool need_threshold) {
  check_matrix(kOp, "x", x, x);
  check_matrix(kOp, "W_enc", W_enc, x);
  const DeviceGuard guard(x.get_device_index());
  const DeviceEntries entries = entries_of(kOp, offsets, indices, x);
  check_shape(kOp, "x", x, {entries.n, W_enc.size(0)});
  const int64_t d_sae = W_enc.size(1);
  const std::optional<Tensor> d_numbers = numbers_of(kOp, "d_values", d_values, entries);
  const Tensor gates = *numbers_of(kOp, "gate", gate, entries);
  Tensor theta;
  if (need_threshold) theta = check_threshold(threshold, bandwidth, d_sae, x);
  const bool by_latent = need_W_enc || need_b_enc || need_threshold;
  FeatureEntries in;
  if (by_latent) {
    in = feature_entries(kOp, entries, d_sae, feature_offsets, permutation, values, gates,
                         d_numbers, d_gate);
  }
  if (dense_pays(x, works(entries, x, W_enc, need_x, need_W_enc))) {
    return call_op(&encode_backward_cuda, "gemmascope_fast_triton::encode_backward", d_values,
                   d_gate, x, W_enc, threshold, bandwidth, offsets, indices, values, gate,
                   feature_offsets, permutation, need_x, need_W_enc, need_b_enc, need_threshold);
  }

  Tensor d_x = torch::stable::new_empty(x, {0}), d_W_enc = torch::stable::new_empty(x, {0});
  Tensor d_b_enc = new_floats(x, need_b_enc ? d_sae : 0);
  Tensor d_threshold = new_floats(x, need_threshold ? d_sae : 0);
  if (need_x) d_x = input_gradient(entries, d_numbers, gates, x, W_enc);
  if (by_latent) {
    const Tensor x_rows = adjacent_columns(x);
    FeaturePass p = feature_pass_of(kOp, in, d_sae);
    p.d_b_enc = mutable_floats(d_b_enc);
    if (need_threshold) want_threshold(&p, theta, bandwidth, d_threshold);
    StoreGradients gradients = {};
    if (need_W_enc) {
      RowGradient gradient(W_enc, true);
      p.encoder = 1;
      p.x = rows_of(x_rows);
      gradients.d_W_enc = gradient.target();
      store_gradients(kOp, p, gradients, x);
      d_W_enc = gradient.finish();
    } else {
      store_gradients(kOp, p, gradients, x);
    }
  }
  return {d_x, d_W_enc, d_b_enc, d_threshold};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("encode_backward", TORCH_BOX(&encode_backward_cuda));
}

}  // namespace gemmascope_fast
