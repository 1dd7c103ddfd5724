// TopK of at most 16 tokens of 16-bit x and W_enc: topk_few_kernel.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/encode_tiles.h"
#include "cuda/topk_scan.h"

namespace gemmascope_fast {
inline namespace on_cuda {

bool topk_few_serves(const EncodeInputs& in);

// The k best of each row, to the rows `which` of `out` (fill_rows); 1 <= k <= d_sae. Nothing waits.
void topk_few(const char* op, const EncodeInputs& in, int64_t k, const int64_t* which,
              const TopkCsr& out, cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
