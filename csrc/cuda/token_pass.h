// Host half of the passes in token order (token_pass_kernel.cuh, pair_dots_kernel.cuh).
#pragma once

#include "cuda/operands.h"

namespace gemmascope_fast {
inline namespace on_cuda {

// out[i] = (out[i] +) bias + sum over the entries e of rows i, i + n, ... of coefficients[e] gate[e] matrix[indices[e]]
struct TokenSum {
  const DeviceEntries* entries;  // on sets * n rows
  const float* coefficients;     // [capacity], null for zeros
  const float* gate;             // [capacity], null for ones
  Tensor matrix;                 // [F, d], one row per latent, any strides
  const float* bias = nullptr;   // [d]
  bool add = false;
};

// out: [n, d], any dtype and strides. The device is current.
void sum_tokens_cuda(const char* op, const TokenSum& sum, const Tensor& out);

// <W[indices[e]], g[row of e]> for every entry, 0 for padding: [capacity] float32.
Tensor dot_tokens_cuda(const char* op, const DeviceEntries& entries, const Tensor& W,
                       const Tensor& g);

}  // namespace on_cuda
}  // namespace gemmascope_fast
