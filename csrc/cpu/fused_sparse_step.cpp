// fused_sparse_step on the CPU: sae_backward and Adam in one pass over the entries, without gradient buffers.
//
//   as sae_backward: d_W_dec[j], d_W_enc[:, j], d_b_enc, d_threshold, d_b_dec;  then adam_step_ on row j of W_dec and W_enc.t()
//
// Feature-major: the two gradient rows of a latent live in a scratch row each (L1/L2), the update reads and writes the rows
// of weights and moments right after. Kernels and order are those of sae_backward followed by adam_step_: the same bits.
// Bound by DRAM: 32 bytes per element of a touched latent's two rows (w and v, read and written), where backward and update
// apart move 64 and write d_W_enc and d_W_dec.
#include <torch/csrc/stable/library.h>

#include "cpu/sae_inputs.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "fused_sparse_step";

}  // namespace

std::tuple<Tensor, Tensor, Tensor> fused_sparse_step_cpu(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth,
    const Tensor& W_dec, const Tensor& d_recon, std::vector<int64_t> group_ends,
    const Tensor& offsets, const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& feature_offsets,
    const Tensor& permutation, std::vector<Tensor> encoder_state, std::vector<Tensor> decoder_state,
    std::vector<double> encoder_rates, std::vector<double> decoder_rates,
    std::vector<int64_t> encoder_rule, std::vector<int64_t> decoder_rule) {
  SaeInputs in =
      sae_inputs(kOp, x, W_enc, threshold, bandwidth, W_dec, d_recon, group_ends, offsets, indices,
                 values, gate, d_values, d_gate, feature_offsets, permutation);
  const AdamMatrix encoder =
      adam_matrix(kOp, "W_enc", features(W_enc), encoder_state, encoder_rates, encoder_rule);
  const AdamMatrix decoder =
      adam_matrix(kOp, "W_dec", matrix_of(W_dec), decoder_state, decoder_rates, decoder_rule);
  const int64_t d_sae = in.entries.d_sae;
  Tensor d_b_enc = empty_vector(values, ScalarType::Float, d_sae);
  Tensor d_threshold = empty_vector(values, ScalarType::Float, bandwidth > 0 ? d_sae : 0);
  Tensor d_b_dec = empty_vector(values, ScalarType::Float, W_dec.size(1));
  in.decoder.d_W_dec = {decoder.weight, false, &decoder};
  in.encoder.d_W_enc = LatentGradient{encoder.weight, false, &encoder};
  in.encoder.d_b_enc = static_cast<float*>(d_b_enc.data_ptr());
  if (bandwidth > 0) in.encoder.d_threshold = static_cast<float*>(d_threshold.data_ptr());
  const Tensor rows = entry_rows(in.entries, values);
  sum_rows(in.decoder.d_recon.front(), in.entries.n, static_cast<float*>(d_b_dec.data_ptr()));
  feature_pass(in.entries, in.view, static_cast<const int64_t*>(rows.data_ptr()), &in.decoder,
               &in.encoder);
  return {d_b_enc, d_threshold, d_b_dec};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, fused_sparse_step_cpu); }

}  // namespace gemmascope_fast
