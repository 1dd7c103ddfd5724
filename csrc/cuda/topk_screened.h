// The screened TopK encoder on CUDA; what is computed: topk_screened_kernel.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "cuda/encode_screened.h"
#include "cuda/topk_scan.h"

namespace gemmascope_fast {
inline namespace on_cuda {

// Rows for the plain encoder: which[0 .. count), in any order.
struct UnsureRows {
  Tensor which;
  int64_t count;
};

// Rows of topk_encode, but those that are returned; nothing where the plain encoder must serve all. k > 0. Waits once,
// and again where a chunk overflowed.
std::optional<UnsureRows> topk_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                        const Tensor& bias, int64_t k, const Tensor& bytes,
                                        const TopkCsr& out, cudaStream_t stream);

// The inputs of these rows.
EncodeInputs gather_rows(const char* op, const EncodeInputs& in, const UnsureRows& rows,
                         cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
