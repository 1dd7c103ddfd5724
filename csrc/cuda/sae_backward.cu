// sae_backward on CUDA: encoder's and decoder's gradients from one pass over the entries.
//
//   q[e] = <W_dec[j], S_g[r]> + d_values[e],  S_g = sum of d_recon[g'] over g' >= g,  g: first with group_ends[g] > j
//   d_W_dec[j] = sum_e values[e] S_g[r],  d_W_enc[:, j] = sum_e q gate x[r % n],  d_b_enc, d_threshold, d_x as
//   encode_backward does with d_values = q;  d_b_dec = sum over g and r of d_recon[g][r]
//
// A launch per group, then the sum in token order for d_x. Dense products take over where they pay (dense_products.h),
// or take the latents that fire most (hot_backward.h).
// Never waits. Bound by reading nnz rows of S and of x, as many of W_enc for d_x, and by writing d_W_enc and d_W_dec.
#include <torch/csrc/stable/library.h>

#include "cuda/dense_products.h"
#include "cuda/hot_backward.h"
#include "cuda/sae_inputs.h"
#include "cuda/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "sae_backward";

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sae_backward_cuda(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth,
    const Tensor& W_dec, const Tensor& d_recon, std::vector<int64_t> group_ends,
    const Tensor& offsets, const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& feature_offsets,
    const Tensor& permutation, bool need_x) {
  check_matrix(kOp, "x", x, x);
  const DeviceGuard guard(x.get_device_index());
  SaeInputs in =
      sae_inputs_cuda(kOp, x, W_enc, threshold, bandwidth, W_dec, d_recon, group_ends, offsets,
                      indices, values, gate, d_values, d_gate, feature_offsets, permutation);
  if (sae_dense_pays(in, W_dec)) {
    return call_op(&sae_backward_cuda, "gemmascope_fast_triton::sae_backward", x, W_enc, threshold,
                   bandwidth, W_dec, d_recon, group_ends, offsets, indices, values, gate, d_values,
                   d_gate, feature_offsets, permutation, need_x);
  }
  const Tensor d_b_enc = new_floats(x, in.d_sae);
  const Tensor d_threshold = new_floats(x, bandwidth > 0 ? in.d_sae : 0);
  // Entries that are in no segment have no gradient.
  const Tensor d_pre =
      torch::stable::new_zeros(x, {need_x ? in.entries.rows.capacity : 0}, ScalarType::Float);
  RowGradient d_W_enc(W_enc, true), d_W_dec(W_dec, false);

  FeaturePass p = sae_pass(kOp, in, d_b_enc, d_threshold);
  p.d_pre = mutable_floats(d_pre);
  const StoreGradients gradients{d_W_enc.target(), d_W_dec.target()};
  const std::optional<HotSplit> hot = split_hot(kOp, in, gradients, x, &p);
  for_groups(kOp, in, p,
             [&](const FeaturePass& group) { store_gradients(kOp, group, gradients, x); });

  Tensor d_x = torch::stable::new_empty(x, {0});
  if (need_x) {
    d_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    sum_tokens_cuda(kOp, {&in.entries.rows, floats(d_pre), nullptr, transposed(W_enc)}, d_x);
  }
  return {d_x, d_W_enc.finish(), d_b_enc, d_threshold, d_W_dec.finish(), sum_rows(d_recon)};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("sae_backward", TORCH_BOX(&sae_backward_cuda));
}

}  // namespace gemmascope_fast
