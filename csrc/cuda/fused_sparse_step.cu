// fused_sparse_step on CUDA: sae_backward without d_x, then Adam on both matrices, row by row without gradient buffers.
//
//   d_W_dec[j], d_W_enc[:, j], d_b_enc, d_threshold, d_b_dec as sae_backward;  adam_step_ on row j
//
// A launch per group of latents. Rows that do not fit in the registers of a block go through float32 gradients and
// adam_step_. Both give the bits of the two ops apart, except where sae_backward is split
// (hot_backward.h). Dense products take over where sae_backward's do. Never waits.
// Bound by reading nnz rows of S and of x and, per element of a touched row, 16 bytes in float32, 6 with bfloat16
// weights and 8-bit moments.
#include <torch/csrc/stable/library.h>

#include "cuda/adam_matrix.h"
#include "cuda/adam_step.h"
#include "cuda/dense_products.h"
#include "cuda/fused_sparse_step_kernel.cuh"
#include "cuda/sae_inputs.h"
#include "cuda/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "fused_sparse_step";

FeatureShape shape_of(const FeaturePass& p) {
  FeatureShape shape;
  check_cuda(kOp, "device attributes", feature_shape_here(p, &shape, &AdamFinish::blocks));
  return shape;
}

void in_registers(const SaeInputs& in, const FeaturePass& pass, const AdamFinish& finish,
                  const Tensor& like) {
  const cudaStream_t stream = current_stream(kOp, like);
  for_groups(kOp, in, pass, [&](FeaturePass p) {
    const FeatureShape shape = shape_of(p);  // S has the dtype of d_recon or float32
    const Tensor pieces = feature_pieces(like, &p);
    check_cuda(kOp, "later pieces", launch_feature_pieces(p, shape, stream));
    check_cuda(kOp, "feature pass", launch_feature_pass(p, shape, finish, stream));
  });
}

void through_gradients(const SaeInputs& in, const FeaturePass& pass, const AdamFinish& finish,
                       const Tensor& like) {
  const auto rows_like = [&](const AdamView& a) {
    return torch::stable::new_empty(like, {a.rows, a.cols}, ScalarType::Float);
  };
  const Tensor d_W_enc = rows_like(finish.encoder), d_W_dec = rows_like(finish.decoder);
  const StoreGradients gradients{target_of(d_W_enc), target_of(d_W_dec)};
  for_groups(kOp, in, pass,
             [&](const FeaturePass& p) { store_gradients(kOp, p, gradients, like); });
  const cudaStream_t stream = current_stream(kOp, like);
  adam_step_rows(kOp, finish.encoder, d_W_enc, stream);
  adam_step_rows(kOp, finish.decoder, d_W_dec, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> fused_sparse_step_cuda(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth,
    const Tensor& W_dec, const Tensor& d_recon, std::vector<int64_t> group_ends,
    const Tensor& offsets, const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& feature_offsets,
    const Tensor& permutation, std::vector<Tensor> encoder_state, std::vector<Tensor> decoder_state,
    std::vector<double> encoder_rates, std::vector<double> decoder_rates,
    std::vector<int64_t> encoder_rule, std::vector<int64_t> decoder_rule) {
  check_matrix(kOp, "x", x, x);
  const DeviceGuard guard(x.get_device_index());
  SaeInputs in =
      sae_inputs_cuda(kOp, x, W_enc, threshold, bandwidth, W_dec, d_recon, group_ends, offsets,
                      indices, values, gate, d_values, d_gate, feature_offsets, permutation);
  AdamFinish finish;
  adam_view(kOp, "W_enc", transposed(W_enc), encoder_state, encoder_rates, encoder_rule,
            &finish.encoder);
  adam_view(kOp, "W_dec", W_dec, decoder_state, decoder_rates, decoder_rule, &finish.decoder);
  if (sae_dense_pays(in, W_dec)) {
    return call_op(&fused_sparse_step_cuda, "gemmascope_fast_triton::fused_sparse_step", x, W_enc,
                   threshold, bandwidth, W_dec, d_recon, group_ends, offsets, indices, values, gate,
                   d_values, d_gate, feature_offsets, permutation, encoder_state, decoder_state,
                   encoder_rates, decoder_rates, encoder_rule, decoder_rule);
  }
  const Tensor d_b_enc = new_floats(x, in.d_sae);
  const Tensor d_threshold = new_floats(x, bandwidth > 0 ? in.d_sae : 0);
  const Tensor d_b_dec = sum_rows(d_recon);

  FeaturePass pass = sae_pass(kOp, in, d_b_enc, d_threshold);
  pass.g = rows_of(torch::stable::select(d_recon, 0, 0));
  if (group_ends.size() > 1) pass.g.dtype = kFloat32;  // the widest S
  if (shape_of(pass).K != 0) {
    in_registers(in, pass, finish, x);
  } else {
    through_gradients(in, pass, finish, x);
  }
  return {d_b_enc, d_threshold, d_b_dec};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("fused_sparse_step", TORCH_BOX(&fused_sparse_step_cuda));
}

}  // namespace gemmascope_fast
