// Host side of encode_sm90_kernel.cuh: the encoder's tiles on compute capability 9.0.
#pragma once

#include <cuda_runtime_api.h>

#include "common/matrix.h"
#include "cuda/encode_tiles.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Whether encode_sm90 can be called: the current device, what this library was built for, the 16-bit `dtype` of both x
// and W, alignment to 16 bytes, sizes. The column blocks of its output are 256 latents wide.
// With Limit::kScreened and kUpperBound x and W are int8 codes, and the dtype is not looked at.
bool encode_sm90_serves(const EncodeTiles& p, Dtype dtype, Limit limit);

// One pass, first or second, on the current device.
cudaError_t encode_sm90(const EncodeTiles& p, Dtype dtype, Limit limit, cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
