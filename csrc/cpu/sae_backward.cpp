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

#include "cpu/feature_pass.h"
#include "cpu/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "sae_backward";

// d_recon[g] as a matrix.
Matrix slice(const Tensor& d_recon, int64_t g) {
  const Dtype dtype = dtype_of(d_recon);
  const char* data = static_cast<const char*>(d_recon.data_ptr());
  return {data + g * d_recon.stride(0) * element_size(dtype),
          dtype,
          d_recon.size(1),
          d_recon.size(2),
          d_recon.stride(1),
          d_recon.stride(2)};
}

// S_{G-1} = d_recon[G-1], S_g = S_{g+1} + d_recon[g].
std::vector<FloatRows> suffix_sums(const Tensor& d_recon) {
  const int64_t groups = d_recon.size(0), m = d_recon.size(1), d = d_recon.size(2);
  std::vector<FloatRows> sums(static_cast<size_t>(groups));
  sums.back() = float_rows(d_recon, slice(d_recon, groups - 1));
  for (int64_t g = groups - 2; g >= 0; --g) {
    const FloatRows& later = sums[static_cast<size_t>(g + 1)];
    const Matrix own = slice(d_recon, g);
    FloatRows sum;
    sum.keep = new_tensor(d_recon, {m, d}, ScalarType::Float);
    float* data = static_cast<float*>(sum.keep.data_ptr());
    parallel_ranges(m, kRowBlock, [&](int64_t begin, int64_t end) {
      load_rows(own, begin, end - begin, data + begin * d, d);
      for (int64_t i = begin * d; i < end * d; ++i) data[i] = later.data[i] + data[i];
    });
    sum.data = data;
    sum.cols = d;
    sums[static_cast<size_t>(g)] = sum;
  }
  return sums;
}

void check_groups(const std::vector<int64_t>& group_ends, const Tensor& d_recon, int64_t d_sae) {
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  if (groups == 0 || groups != d_recon.size(0)) {
    fail(kOp, "group_ends must have one element for each of d_recon's ", d_recon.size(0),
         " >= 1 groups, got ", groups);
  }
  int64_t previous = 0;
  for (int64_t end : group_ends) {
    if (end < previous) fail(kOp, "group_ends must ascend from 0, got ", end, " after ", previous);
    previous = end;
  }
  if (previous != d_sae) {
    fail(kOp, "group_ends must end with d_sae=", d_sae, ", got ", previous);
  }
}

void check_weights(const Tensor& x, const Tensor& W_enc, const Tensor& W_dec,
                   const Tensor& d_recon) {
  check_dim(kOp, "x", x, 2);
  check_dim(kOp, "W_enc", W_enc, 2);
  check_dim(kOp, "W_dec", W_dec, 2);
  check_dim(kOp, "d_recon", d_recon, 3);
  check_float(kOp, "x", x);
  check_float(kOp, "W_enc", W_enc);
  check_float(kOp, "W_dec", W_dec);
  check_float(kOp, "d_recon", d_recon);
  check_shape(kOp, "W_enc", W_enc, {x.size(1), W_dec.size(0)});
}

// m = S * n, or 0 rows of both.
int64_t count_sets(int64_t m, int64_t n) {
  if (n == 0 && m == 0) return 1;
  if (n == 0 || m % n != 0) fail(kOp, "offsets has ", m, " rows, expected a multiple of n=", n);
  return m / n;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sae_backward_cpu(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> threshold, double bandwidth,
    const Tensor& W_dec, const Tensor& d_recon, std::vector<int64_t> group_ends,
    const Tensor& offsets, const Tensor& indices, const Tensor& values, const Tensor& gate,
    std::optional<Tensor> d_values, std::optional<Tensor> d_gate, const Tensor& feature_offsets,
    const Tensor& permutation, bool need_x) {
  check_weights(x, W_enc, W_dec, d_recon);
  const int64_t d_sae = W_dec.size(0);
  check_groups(group_ends, d_recon, d_sae);
  Entries entries = check_entries(kOp, offsets, indices, d_sae);
  check_shape(kOp, "d_recon", d_recon, {d_recon.size(0), entries.n, W_dec.size(1)});
  const int64_t sets = count_sets(entries.n, x.size(0));
  entries.values = entry_floats(kOp, "values", values, &entries);
  entries.gate = entry_floats(kOp, "gate", gate, &entries);
  EncoderPart encoder;
  encoder.d_values = entry_floats(kOp, "d_values", d_values, &entries);
  encoder.d_gate = entry_floats(kOp, "d_gate", d_gate, &entries);
  if (bandwidth > 0) {
    if (!threshold.has_value()) fail(kOp, "bandwidth ", bandwidth, " > 0 needs a threshold");
    encoder.threshold =
        vector_data<float>(kOp, "threshold", *threshold, ScalarType::Float, d_sae, &entries.keep);
  }
  const FeatureView view = check_feature_view(kOp, feature_offsets, permutation, entries);

  const Gradient d_W_enc = gradient_like(W_enc, features(W_enc), entries.touched()),
                 d_W_dec = gradient_like(W_dec, matrix_of(W_dec), entries.touched());
  Tensor d_b_enc = empty_vector(values, ScalarType::Float, d_sae);
  Tensor d_threshold = empty_vector(values, ScalarType::Float, bandwidth > 0 ? d_sae : 0);
  Tensor d_b_dec = empty_vector(values, ScalarType::Float, W_dec.size(1));
  const Tensor d_pre = empty_vector(values, ScalarType::Float, need_x ? entries.capacity : 0);

  DecoderPart decoder;
  decoder.W_dec = matrix_of(W_dec);
  decoder.d_recon = suffix_sums(d_recon);
  decoder.group_ends = group_ends;
  decoder.d_W_dec = {matrix_of(d_W_dec.tensor), d_W_dec.zeroed};
  encoder.x = float_rows(x, matrix_of(x));
  encoder.n = x.size(0);
  encoder.d_W_enc = LatentGradient{features(d_W_enc.tensor), d_W_enc.zeroed};
  encoder.bandwidth = bandwidth;
  encoder.d_b_enc = static_cast<float*>(d_b_enc.data_ptr());
  if (bandwidth > 0) encoder.d_threshold = static_cast<float*>(d_threshold.data_ptr());
  if (need_x) encoder.d_pre = static_cast<float*>(d_pre.data_ptr());
  const Tensor rows = entry_rows(entries, values);
  feature_pass(entries, view, static_cast<const int64_t*>(rows.data_ptr()), &decoder, &encoder);

  Tensor d_x = need_x ? tensor_like(x) : empty_vector(x, x.scalar_type(), 0);
  if (need_x) {
    sum_tokens({&entries, encoder.d_pre, &W_enc, features(W_enc), nullptr, false, sets},
               matrix_of(d_x));
  }
  sum_rows(decoder.d_recon.front(), entries.n, static_cast<float*>(d_b_dec.data_ptr()));
  return {d_x, d_W_enc.tensor, d_b_enc, d_threshold, d_W_dec.tensor, d_b_dec};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, sae_backward_cpu); }

}  // namespace gemmascope_fast
