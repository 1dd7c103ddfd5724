// pre_at on CUDA: host wrapper of pre_at_kernel.cuh. A pair out of range gives 0.
#include <torch/csrc/stable/library.h>

#include "cuda/operands.h"
#include "cuda/pre_at_kernel.cuh"

namespace gemmascope_fast {

Tensor pre_at_cuda(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& rows,
                   const Tensor& latents) {
  constexpr const char* op = "pre_at";
  check_matrix(op, "x", x, x);
  check_matrix(op, "W_enc", W_enc, x);
  check_shape(op, "W_enc", W_enc, {x.size(1), W_enc.size(1)});
  check_dim(op, "rows", rows, 1);
  const int64_t pairs = rows.size(0);
  const DeviceGuard guard(x.get_device_index());
  const Tensor bias = vector_of(op, "b_enc", b_enc, ScalarType::Float, W_enc.size(1), x);
  const Tensor row = vector_of(op, "rows", rows, ScalarType::Long, pairs, x);
  const Tensor latent = vector_of(op, "latents", latents, ScalarType::Long, pairs, x);
  Tensor pre = new_floats(x, pairs);
  if (pairs == 0) return pre;
  PreAt p;
  p.x = rows_of(x);
  p.W = rows_of(features(W_enc));
  p.bias = floats(bias);
  p.rows = static_cast<const int64_t*>(row.data_ptr());
  p.latents = static_cast<const int64_t*>(latent.data_ptr());
  p.pairs = pairs;
  p.pre = mutable_floats(pre);
  pre_at_kernel<<<pair_blocks(pairs), kPairThreads, 0, current_stream(op, x)>>>(p);
  check_launch(op);
  return pre;
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) { m.impl("pre_at", TORCH_BOX(&pre_at_cuda)); }

}  // namespace gemmascope_fast
