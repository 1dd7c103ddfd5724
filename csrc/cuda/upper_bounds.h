// What each pre-activation can be at most, by int8 products (quantise_kernel.cuh): for the screened encoders that
// select by rank, TopK and BatchTopK.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/encode_screened.h"
#include "cuda/select_prefixes.h"

namespace gemmascope_fast {
inline namespace on_cuda {

struct UpperBounds {
  ScreenedOperands given;  // bias [d_sae]: codes per unit of the latents
  Tensor limit;            // [d_sae]

  UpperBounds(const char* op, const Tensor& x, const Tensor& bias, const ScreenedEncoder& packed,
              const Tensor& bytes, cudaStream_t stream);

  // The bounds of the rows from `begin` on, as many as `least` has, and of a chunk's latents that exceed least[i], as
  // encode_candidates; none of tokens that have no codes, whose given.bound is NaN.
  EncodeCsr candidates(const char* op, int64_t begin, const Tensor& least, Prefix chunk,
                       int64_t capacity, cudaStream_t stream) const;
};

}  // namespace on_cuda
}  // namespace gemmascope_fast
