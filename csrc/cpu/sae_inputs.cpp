#include "cpu/sae_inputs.h"

namespace gemmascope_fast {
namespace {

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
      for (int64_t r = begin; r < end; ++r) {
        const float* row = later.row(r);
        for (int64_t k = 0; k < d; ++k) data[r * d + k] = row[k] + data[r * d + k];
      }
    });
    sum.data = data;
    sum.cols = sum.stride = d;
    sums[static_cast<size_t>(g)] = sum;
  }
  return sums;
}

void check_groups(const char* op, const std::vector<int64_t>& group_ends, const Tensor& d_recon,
                  int64_t d_sae) {
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  if (groups == 0 || groups != d_recon.size(0)) {
    fail(op, "group_ends must have one element for each of d_recon's ", d_recon.size(0),
         " >= 1 groups, got ", groups);
  }
  int64_t previous = 0;
  for (int64_t end : group_ends) {
    if (end < previous) fail(op, "group_ends must ascend from 0, got ", end, " after ", previous);
    previous = end;
  }
  if (previous != d_sae) {
    fail(op, "group_ends must end with d_sae=", d_sae, ", got ", previous);
  }
}

void check_weights(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& W_dec,
                   const Tensor& d_recon) {
  check_dim(op, "x", x, 2);
  check_dim(op, "W_enc", W_enc, 2);
  check_dim(op, "W_dec", W_dec, 2);
  check_dim(op, "d_recon", d_recon, 3);
  check_float(op, "x", x);
  check_float(op, "W_enc", W_enc);
  check_float(op, "W_dec", W_dec);
  check_float(op, "d_recon", d_recon);
  check_shape(op, "W_enc", W_enc, {x.size(1), W_dec.size(0)});
}

// m = S * n, or 0 rows of both.
int64_t count_sets(const char* op, int64_t m, int64_t n) {
  if (n == 0 && m == 0) return 1;
  if (n == 0 || m % n != 0) fail(op, "offsets has ", m, " rows, expected a multiple of n=", n);
  return m / n;
}

}  // namespace

SaeInputs sae_inputs(const char* op, const Tensor& x, const Tensor& W_enc,
                     const std::optional<Tensor>& threshold, double bandwidth, const Tensor& W_dec,
                     const Tensor& d_recon, const std::vector<int64_t>& group_ends,
                     const Tensor& offsets, const Tensor& indices, const Tensor& values,
                     const Tensor& gate, const std::optional<Tensor>& d_values,
                     const std::optional<Tensor>& d_gate, const Tensor& feature_offsets,
                     const Tensor& permutation) {
  check_weights(op, x, W_enc, W_dec, d_recon);
  SaeInputs in;
  const int64_t d_sae = W_dec.size(0);
  check_groups(op, group_ends, d_recon, d_sae);
  in.entries = check_entries(op, offsets, indices, d_sae);
  check_shape(op, "d_recon", d_recon, {d_recon.size(0), in.entries.n, W_dec.size(1)});
  in.sets = count_sets(op, in.entries.n, x.size(0));
  in.entries.values = entry_floats(op, "values", values, &in.entries);
  in.entries.gate = entry_floats(op, "gate", gate, &in.entries);
  EncoderPart& encoder = in.encoder;
  encoder.d_values = entry_floats(op, "d_values", d_values, &in.entries);
  encoder.d_gate = entry_floats(op, "d_gate", d_gate, &in.entries);
  if (bandwidth > 0) {
    if (!threshold.has_value()) fail(op, "bandwidth ", bandwidth, " > 0 needs a threshold");
    encoder.threshold =
        vector_data<float>(op, "threshold", *threshold, ScalarType::Float, d_sae, &in.entries.keep);
  }
  in.view = check_feature_view(op, feature_offsets, permutation, in.entries);
  in.decoder.W_dec = matrix_of(W_dec);
  in.decoder.d_recon = suffix_sums(d_recon);
  in.decoder.group_ends = group_ends;
  encoder.x = float_rows(x, matrix_of(x));
  encoder.n = x.size(0);
  encoder.bandwidth = bandwidth;
  return in;
}

}  // namespace gemmascope_fast
