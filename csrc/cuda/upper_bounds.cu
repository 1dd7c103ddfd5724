// Host side of the bounds of pre-activations.
//
//   x -> codes and margins of the tokens                quantise_kernel
//   bias, codes of the latents -> their limits          upper_limit_kernel
//   codes -> what pre can be at most                    encode_sm90_kernel<int8_t, Limit::kUpperBound>
#include <torch/csrc/stable/ops.h>

#include "cuda/runtime.h"
#include "cuda/upper_bounds.h"
#include "cuda/upper_limit_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

UpperBounds::UpperBounds(const char* op, const Tensor& x, const Tensor& bias,
                         const ScreenedEncoder& packed, const Tensor& bytes, cudaStream_t stream)
    : given(screened_operands(op, x, packed, bytes, stream)),
      limit(torch::stable::new_empty(bias, {packed.d_sae}, ScalarType::Float)) {
  given.in.bias = torch::stable::new_empty(bias, {packed.d_sae}, ScalarType::Float);
  const int64_t blocks = (packed.d_sae + kUpperLimitThreads - 1) / kUpperLimitThreads;
  upper_limit_kernel<<<static_cast<unsigned>(blocks), kUpperLimitThreads, 0, stream>>>(
      packed.latents(), static_cast<const float*>(bias.data_ptr()), packed.d_sae,
      static_cast<float*>(given.in.bias.data_ptr()), static_cast<float*>(limit.data_ptr()));
  check_launch(op);
}

EncodeCsr UpperBounds::candidates(const char* op, int64_t begin, const Tensor& least, Prefix chunk,
                                  int64_t capacity, cudaStream_t stream) const {
  const int64_t rows = least.size(0);
  EncodeLimit part;
  part.kind = Limit::kUpperBound;
  part.values = tokens_of(given.bound, begin, rows);
  part.scale = tokens_of(given.scale, begin, rows);
  part.latent = limit;
  part.least = least;
  part.first = chunk.first;
  part.last = chunk.last;
  return encode_candidates(op, given.in.of_rows(begin, rows), part, capacity, stream);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
