// encode_backward on the CPU, with d_pre[e] = d_values[e] gate[e].
//
//   d_x[i] = sum_e d_pre[e] W_enc[:, j],  d_W_enc[:, j] = sum_e d_pre[e] x[i],  d_b_enc[j] = sum_e d_pre[e],
//   d_threshold[j] = -(1 / bandwidth) sum_e in_window[e] (threshold[j] d_values[e] + d_gate[e])
//
// d_x: token-major sums of W_enc's rows. The parameters' gradients: one feature-major pass (arXiv 2407.14435, section 3,
// for the pseudo-derivative of the threshold). Bound by nnz rows of W_enc and by writing d_W_enc.
#include <torch/csrc/stable/library.h>

#include "cpu/feature_pass.h"
#include "cpu/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "encode_backward";

Tensor input_gradient(const Entries& entries, const float* d_values, const Tensor& x,
                      const Tensor& W_enc) {
  const Tensor d_pre = empty_vector(W_enc, ScalarType::Float, entries.nnz);
  float* coef = static_cast<float*>(d_pre.data_ptr());
  parallel_ranges(entries.nnz, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      coef[e] = (d_values != nullptr ? d_values[e] : 0.0f) * entries.gate[e];
    }
  });
  Tensor d_x = tensor_like(x);
  sum_tokens({&entries, coef, &W_enc, features(W_enc)}, matrix_of(d_x));
  return d_x;
}

const float* check_threshold(const std::optional<Tensor>& threshold, double bandwidth,
                             Entries* entries) {
  if (!threshold.has_value()) fail(kOp, "need_threshold: threshold must be given");
  if (!(bandwidth > 0)) {
    fail(kOp, "bandwidth must be > 0 for the threshold's gradient, got ", bandwidth,
         "; pass a bandwidth or detach the threshold");
  }
  return vector_data<float>(kOp, "threshold", *threshold, ScalarType::Float, entries->d_sae,
                            &entries->keep);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_backward_cpu(
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& x,
    const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth, const Tensor& offsets,
    const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> feature_offsets, std::optional<Tensor> permutation, bool need_x,
    bool need_W_enc, bool need_b_enc, bool need_threshold) {
  check_dim(kOp, "W_enc", W_enc, 2);
  check_float(kOp, "W_enc", W_enc);
  check_float(kOp, "x", x);
  Entries entries = check_entries(kOp, offsets, indices, W_enc.size(1));
  check_shape(kOp, "x", x, {entries.n, W_enc.size(0)});
  entries.values = entry_floats(kOp, "values", values, &entries);
  entries.gate = entry_floats(kOp, "gate", gate, &entries);
  EncoderPart encoder;
  encoder.d_values = entry_floats(kOp, "d_values", d_values, &entries);
  encoder.d_gate = entry_floats(kOp, "d_gate", d_gate, &entries);
  if (need_threshold) encoder.threshold = check_threshold(threshold, bandwidth, &entries);
  encoder.bandwidth = bandwidth;
  encoder.n = entries.n;
  const bool parameters = need_W_enc || need_b_enc || need_threshold;
  FeatureView view;
  if (parameters) {
    view = feature_view(kOp, offsets, indices, feature_offsets, permutation, entries);
  }
  const int64_t d_sae = entries.d_sae;
  Tensor d_b_enc = empty_vector(values, ScalarType::Float, need_b_enc ? d_sae : 0);
  Tensor d_threshold = empty_vector(values, ScalarType::Float, need_threshold ? d_sae : 0);
  if (need_b_enc) encoder.d_b_enc = static_cast<float*>(d_b_enc.data_ptr());
  if (need_threshold) encoder.d_threshold = static_cast<float*>(d_threshold.data_ptr());
  Gradient d_W_enc{empty_vector(x, x.scalar_type(), 0)};
  if (need_W_enc) {
    d_W_enc = gradient_like(W_enc, features(W_enc), entries.touched());
    encoder.d_W_enc = LatentGradient{features(d_W_enc.tensor), d_W_enc.zeroed};
    encoder.x = float_rows(x, matrix_of(x));
  }
  if (parameters) {
    const Tensor rows = entry_rows(entries, W_enc);
    feature_pass(entries, view, static_cast<const int64_t*>(rows.data_ptr()), nullptr, &encoder);
  }
  Tensor d_x = need_x ? input_gradient(entries, encoder.d_values, x, W_enc)
                      : empty_vector(x, x.scalar_type(), 0);
  return {d_x, d_W_enc.tensor, d_b_enc, d_threshold};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, encode_backward_cpu); }

}  // namespace gemmascope_fast
