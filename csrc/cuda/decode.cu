// decode and decode_ on CUDA: host wrappers of token_pass_kernel.cuh.
//
//   recon [n, d_out] = b_dec [d_out] + values * W_dec[indices]     (entries of a row in stored order)
//
// Nothing waits for the device; an index out of range contributes nothing. For small dictionaries and dense activations
// a dense product takes over (dense_products.h).
#include <torch/csrc/stable/library.h>

#include "common/overlap.h"
#include "cuda/dense_products.h"
#include "cuda/token_pass.h"

namespace gemmascope_fast {

Tensor decode_cuda(const Tensor& offsets, const Tensor& indices, const Tensor& values,
                   const Tensor& W_dec, std::optional<Tensor> b_dec,
                   std::optional<Tensor> feature_offsets, std::optional<Tensor> permutation,
                   ScalarType dtype) {
  constexpr const char* op = "decode";
  check_matrix(op, "W_dec", W_dec, W_dec);
  const DeviceGuard guard(W_dec.get_device_index());
  const DeviceEntries entries = entries_of(op, offsets, indices, W_dec);
  const Tensor numbers = *numbers_of(op, "values", values, entries);
  std::optional<Tensor> bias;
  if (b_dec.has_value()) {
    bias = vector_of(op, "b_dec", *b_dec, ScalarType::Float, W_dec.size(1), W_dec);
  }
  check_float(op, "dtype", dtype);
  if (dense_pays(W_dec,
                 {sum_work(Walk::kTokens, entries.capacity, entries.n, W_dec, dtype_of(dtype))})) {
    return call_op(&decode_cuda, "gemmascope_fast_triton::decode", offsets, indices, values, W_dec,
                   b_dec, feature_offsets, permutation, dtype);
  }
  Tensor recon = torch::stable::new_empty(W_dec, {entries.n, W_dec.size(1)}, dtype);
  TokenSum sum{&entries, floats(numbers), nullptr, W_dec};
  sum.bias = floats(bias);
  sum_tokens_cuda(op, sum, recon);
  return recon;
}

void decode__cuda(Tensor recon, const Tensor& offsets, const Tensor& indices, const Tensor& values,
                  const Tensor& W_dec) {
  constexpr const char* op = "decode_";
  check_matrix(op, "W_dec", W_dec, W_dec);
  check_matrix(op, "recon", recon, W_dec);
  const DeviceGuard guard(W_dec.get_device_index());
  const DeviceEntries entries = entries_of(op, offsets, indices, W_dec);
  check_shape(op, "recon", recon, {entries.n, W_dec.size(1)});
  const Tensor numbers = *numbers_of(op, "values", values, entries);
  check_distinct_elements(op, "recon", recon);
  check_separate(op, "recon", recon, "W_dec", W_dec);
  check_separate(op, "recon", recon, "values", values);
  check_separate(op, "recon", recon, "offsets", offsets);
  check_separate(op, "recon", recon, "indices", indices);
  if (dense_pays(W_dec,
                 {sum_work(Walk::kTokens, entries.capacity, entries.n, W_dec, dtype_of(recon))})) {
    return call_op(&decode__cuda, "gemmascope_fast_triton::decode_", recon, offsets, indices,
                   values, W_dec);
  }
  TokenSum sum{&entries, floats(numbers), nullptr, W_dec};
  sum.add = true;
  sum_tokens_cuda(op, sum, recon);
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("decode", TORCH_BOX(&decode_cuda));
  m.impl("decode_", TORCH_BOX(&decode__cuda));
}

}  // namespace gemmascope_fast
