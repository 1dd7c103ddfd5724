// sae_backward on the CPU: encoder's and decoder's gradients from one pass over the entries.
//
//   q[e] = <W_dec[j], S_g[r]> + d_values[e],  S_g = sum of d_recon[g'] over g' >= g,  g: first group with group_ends > j
//   d_W_dec[j] = sum_e values[e] S_g[r],  d_W_enc[:, j] = sum_e q gate x[r % n],  d_b_enc, d_threshold, d_x as
//   encode_backward does with d_values = q;  d_b_dec = sum over g and r of d_recon[g][r]
//
// Feature-major: two row reads per entry (S_g, x) and one of W_dec per touched latent, then the token-major pass for d_x.
// Same kernels in the same order as decode_backward and encode_backward: the same bits as composing them (G = S = 1).
// Bound by writing the dense gradients d_W_enc and d_W_dec.
#include <torch/csrc/stable/library.h>

#include "cpu/sae_inputs.h"
#include "cpu/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "sae_backward";

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sae_backward_cpu(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth,
    const Tensor& W_dec, const Tensor& d_recon, std::vector<int64_t> group_ends,
    const Tensor& offsets, const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& feature_offsets,
    const Tensor& permutation, bool need_x) {
  SaeInputs in =
      sae_inputs(kOp, x, W_enc, threshold, bandwidth, W_dec, d_recon, group_ends, offsets, indices,
                 values, gate, d_values, d_gate, feature_offsets, permutation);
  const Entries& entries = in.entries;
  DecoderPart& decoder = in.decoder;
  EncoderPart& encoder = in.encoder;
  const int64_t d_sae = entries.d_sae;

  const Gradient d_W_enc = gradient_like(W_enc, features(W_enc), entries.touched()),
                 d_W_dec = gradient_like(W_dec, matrix_of(W_dec), entries.touched());
  Tensor d_b_enc = empty_vector(values, ScalarType::Float, d_sae);
  Tensor d_threshold = empty_vector(values, ScalarType::Float, bandwidth > 0 ? d_sae : 0);
  Tensor d_b_dec = empty_vector(values, ScalarType::Float, W_dec.size(1));
  const Tensor d_pre = empty_vector(values, ScalarType::Float, need_x ? entries.capacity : 0);

  decoder.d_W_dec = {matrix_of(d_W_dec.tensor), d_W_dec.zeroed};
  encoder.d_W_enc = LatentGradient{features(d_W_enc.tensor), d_W_enc.zeroed};
  encoder.d_b_enc = static_cast<float*>(d_b_enc.data_ptr());
  if (bandwidth > 0) encoder.d_threshold = static_cast<float*>(d_threshold.data_ptr());
  if (need_x) encoder.d_pre = static_cast<float*>(d_pre.data_ptr());
  const Tensor rows = entry_rows(entries, values);
  feature_pass(entries, in.view, static_cast<const int64_t*>(rows.data_ptr()), &decoder, &encoder);

  Tensor d_x = need_x ? tensor_like(x) : empty_vector(x, x.scalar_type(), 0);
  if (need_x) {
    sum_tokens({&entries, encoder.d_pre, &W_enc, features(W_enc), nullptr, false, in.sets},
               matrix_of(d_x));
  }
  sum_rows(decoder.d_recon.front(), entries.n, static_cast<float*>(d_b_dec.data_ptr()));
  return {d_x, d_W_enc.tensor, d_b_enc, d_threshold, d_W_dec.tensor, d_b_dec};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, sae_backward_cpu); }

}  // namespace gemmascope_fast
