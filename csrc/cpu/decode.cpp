// decode and decode_ on the CPU: the sparse product of activations with the decoder.
//
//   recon [n, d_out] = b_dec [d_out] + values * W_dec[indices]     (entries of a row in stored order)
//
// Token-major: each row accumulates in float32 in L1 (or directly in a float32 output) while W_dec's rows stream past,
// four at a time with the next four prefetched. Rounded to the output's dtype once. Bound by reading nnz rows of W_dec.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/token_pass.h"

namespace gemmascope_fast {
namespace {

void check_W_dec(const char* op, const Tensor& W_dec) {
  check_dim(op, "W_dec", W_dec, 2);
  check_float(op, "W_dec", W_dec);
}

// Two elements of recon in one place would make the sum depend on the order of the writes.
void check_writable(const char* op, const Tensor& recon) {
  for (int64_t i = 0; i < 2; ++i) {
    if (recon.size(i) > 1 && recon.stride(i) == 0) {
      fail(op, "recon must not be expanded: dimension ", i, " of shape ", shape_of(recon),
           " has stride 0; pass recon.contiguous()");
    }
  }
}

}  // namespace

Tensor decode_cpu(const Tensor& offsets, const Tensor& indices, const Tensor& values,
                  const Tensor& W_dec, std::optional<Tensor> b_dec, std::optional<Tensor>,
                  std::optional<Tensor>, ScalarType dtype) {
  constexpr const char* op = "decode";
  check_W_dec(op, W_dec);
  Entries entries = check_entries(op, offsets, indices, W_dec.size(0));
  const float* coef = entry_floats(op, "values", values, &entries);
  const float* bias = nullptr;
  if (b_dec.has_value()) {
    bias = vector_data<float>(op, "b_dec", *b_dec, ScalarType::Float, W_dec.size(1), &entries.keep);
  }
  Tensor recon = torch::stable::new_empty(W_dec, {entries.n, W_dec.size(1)}, dtype);
  check_float(op, "dtype", recon);
  sum_tokens({&entries, coef, &W_dec, matrix_of(W_dec), bias}, matrix_of(recon));
  return recon;
}

void decode__cpu(Tensor recon, const Tensor& offsets, const Tensor& indices, const Tensor& values,
                 const Tensor& W_dec) {
  constexpr const char* op = "decode_";
  check_W_dec(op, W_dec);
  check_float(op, "recon", recon);
  Entries entries = check_entries(op, offsets, indices, W_dec.size(0));
  check_shape(op, "recon", recon, {entries.n, W_dec.size(1)});
  check_writable(op, recon);
  const float* coef = entry_floats(op, "values", values, &entries);
  sum_tokens({&entries, coef, &W_dec, matrix_of(W_dec), nullptr, true}, matrix_of(recon));
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode_cpu));
  m.impl("decode_", TORCH_BOX(&decode__cpu));
}

}  // namespace gemmascope_fast
