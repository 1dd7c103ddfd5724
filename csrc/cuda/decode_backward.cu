// decode_backward on CUDA.
//
//   d_values[e] = <W_dec[j], d_recon[i]>,  d_W_dec[j] = sum_e values[e] d_recon[i],  d_b_dec = sum_i d_recon[i]
//
// d_values alone in token order; with d_W_dec from one feature-major pass, which reads a row of d_recon once for both.
// Dense products take over where they pay (dense_products.h). Never waits. Bound by reading nnz rows of d_recon
// (or of W_dec), and by writing d_W_dec.
#include <torch/csrc/stable/library.h>

#include "cuda/dense_products.h"
#include "cuda/feature_pass.h"
#include "cuda/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "decode_backward";

Tensor weight_gradient(FeatureEntries& entries, const Tensor& W_dec, const Tensor& d_recon,
                       const Tensor& d_values) {
  const Tensor weights = adjacent_columns(W_dec), g = adjacent_columns(d_recon);
  RowGradient d_W_dec(W_dec, false);
  FeaturePass p = feature_pass_of(kOp, entries, W_dec.size(0));
  p.decoder = 1;
  p.g = rows_of(g);
  if (d_values.numel() > 0) {
    p.dots = 1;
    p.W_dec = rows_of(weights);
    p.d_values = mutable_floats(d_values);
  }
  StoreGradients gradients = {};
  gradients.d_W_dec = d_W_dec.target();
  store_gradients(kOp, p, gradients, d_values);
  return d_W_dec.finish();
}

std::vector<DenseWork> works(const DeviceEntries& entries, const Tensor& W_dec,
                             const Tensor& d_recon, bool need_values, bool need_W_dec) {
  std::vector<DenseWork> found;
  // Beside d_W_dec the dot products read nothing of their own.
  if (need_values) found.push_back(dots_work(need_W_dec ? 0 : entries.capacity, W_dec, d_recon));
  if (need_W_dec) {
    found.push_back(
        sum_work(Walk::kLatents, entries.capacity, W_dec.size(0), d_recon, dtype_of(W_dec)));
  }
  return found;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_backward_cuda(
    const Tensor& d_recon, const Tensor& offsets, const Tensor& indices, const Tensor& values,
    const Tensor& W_dec, std::optional<Tensor> feature_offsets, std::optional<Tensor> permutation,
    bool need_values, bool need_W_dec, bool need_b_dec) {
  check_matrix(kOp, "W_dec", W_dec, W_dec);
  check_matrix(kOp, "d_recon", d_recon, W_dec);
  const DeviceGuard guard(W_dec.get_device_index());
  const DeviceEntries entries = entries_of(kOp, offsets, indices, W_dec);
  check_shape(kOp, "d_recon", d_recon, {entries.n, W_dec.size(1)});
  numbers_of(kOp, "values", values, entries);
  FeatureEntries in;
  if (need_W_dec) {
    in = feature_entries(kOp, entries, W_dec.size(0), feature_offsets, permutation, values,
                         std::nullopt, std::nullopt, std::nullopt);
  }
  if (dense_pays(W_dec, works(entries, W_dec, d_recon, need_values, need_W_dec))) {
    return call_op(&decode_backward_cuda, "gemmascope_fast_triton::decode_backward", d_recon,
                   offsets, indices, values, W_dec, feature_offsets, permutation, need_values,
                   need_W_dec, need_b_dec);
  }
  Tensor d_values = new_floats(W_dec, 0), d_W_dec = new_floats(W_dec, 0),
         d_b_dec = new_floats(W_dec, 0);
  if (need_W_dec) {
    // Entries that are in no segment have no gradient.
    if (need_values)
      d_values = torch::stable::new_zeros(W_dec, {entries.capacity}, ScalarType::Float);
    d_W_dec = weight_gradient(in, W_dec, d_recon, d_values);
  } else if (need_values) {
    d_values = dot_tokens_cuda(kOp, entries, W_dec, d_recon);
  }
  if (need_b_dec) d_b_dec = sum_rows(d_recon);
  return {d_values, d_W_dec, d_b_dec};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("decode_backward", TORCH_BOX(&decode_backward_cuda));
}

}  // namespace gemmascope_fast
