// decode_backward on the CPU.
//
//   d_values[e] = <W_dec[j], d_recon[i]>,  d_W_dec[j] = sum_e values[e] d_recon[i],  d_b_dec = sum_i d_recon[i]
//
// d_values alone: token-major, d_recon's row in L1, W_dec's rows streamed. With d_W_dec: one feature-major pass that uses
// each row of d_recon for the dot product and the update. Bound by nnz rows of W_dec, or by writing d_W_dec.
#include <torch/csrc/stable/library.h>

#include "cpu/feature_pass.h"
#include "cpu/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "decode_backward";

void weight_gradient(const Entries& entries, const FeatureView& view, const Tensor& W_dec,
                     const FloatRows& g, const Gradient& d_W_dec, float* d_values) {
  DecoderPart decoder;
  if (d_values != nullptr) decoder.W_dec = matrix_of(W_dec);
  decoder.d_recon = {g};
  decoder.group_ends = {entries.d_sae};
  decoder.d_W_dec = {matrix_of(d_W_dec.tensor), d_W_dec.zeroed};
  decoder.d_values = d_values;
  if (d_values != nullptr) std::fill(d_values + entries.nnz, d_values + entries.capacity, 0.0f);
  const Tensor rows = entry_rows(entries, W_dec);
  feature_pass(entries, view, static_cast<const int64_t*>(rows.data_ptr()), &decoder, nullptr);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_backward_cpu(
    const Tensor& d_recon, const Tensor& offsets, const Tensor& indices, const Tensor& values,
    const Tensor& W_dec, std::optional<Tensor> feature_offsets, std::optional<Tensor> permutation,
    bool need_values, bool need_W_dec, bool need_b_dec) {
  check_dim(kOp, "W_dec", W_dec, 2);
  check_float(kOp, "W_dec", W_dec);
  check_float(kOp, "d_recon", d_recon);
  Entries entries = check_entries(kOp, offsets, indices, W_dec.size(0));
  entries.values = entry_floats(kOp, "values", values, &entries);
  check_shape(kOp, "d_recon", d_recon, {entries.n, W_dec.size(1)});
  FeatureView view;
  if (need_W_dec) {
    view = feature_view(kOp, offsets, indices, feature_offsets, permutation, entries);
  }
  const FloatRows g = float_rows(d_recon, matrix_of(d_recon));
  Tensor d_values = empty_vector(values, ScalarType::Float, need_values ? entries.capacity : 0);
  Tensor d_b_dec = empty_vector(values, ScalarType::Float, need_b_dec ? W_dec.size(1) : 0);
  Gradient d_W_dec{empty_vector(values, ScalarType::Float, 0)};
  float* value_gradients = static_cast<float*>(d_values.data_ptr());
  if (need_W_dec) {
    d_W_dec = gradient_like(W_dec, matrix_of(W_dec), entries.touched());
    weight_gradient(entries, view, W_dec, g, d_W_dec, need_values ? value_gradients : nullptr);
  } else if (need_values) {
    dot_tokens(entries, W_dec, matrix_of(W_dec), g, value_gradients);
  }
  if (need_b_dec) sum_rows(g, entries.n, static_cast<float*>(d_b_dec.data_ptr()));
  return {d_values, d_W_dec.tensor, d_b_dec};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, decode_backward_cpu); }

}  // namespace gemmascope_fast
