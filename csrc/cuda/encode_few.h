// Host side of encode_few_kernel.cuh: the encoder's tiles of at most 16 tokens.
#pragma once

#include <cuda_runtime_api.h>

#include "common/matrix.h"
#include "cuda/encode_tiles.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Whether encode_few can be called: n <= 16, 16-bit `dtype` of x and W. The column blocks of its output are 32 latents
// wide, and it does not read p.limit.
bool encode_few_serves(const EncodeTiles& p, Dtype dtype, Limit limit);

// One pass, first or second, on the current device.
cudaError_t encode_few(const EncodeTiles& p, Dtype dtype, Limit limit, cudaStream_t stream);

// All keys of the product instead (topk_few_kernel.cuh).
struct FewKeys;
cudaError_t few_keys(const EncodeTiles& p, Dtype dtype, const FewKeys& out, cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
