// The screened BatchTopK encoder on CUDA: of what int8 products left of a batch, the best by exact pre-activations.
//
//   upper(i, j) = the most that pre(i, j) can be (upper_bounds.h), kept of the `room` > count largest of the batch
//   pre(i, j)   = x_i . w_j + bias_j, float32, of those
//
// An entry that was not kept has pre <= upper <= the smallest upper kept. So the `count` best of the kept ones are the
// batch's if the least of them exceeds that, or if no more than `room` entries can be positive. A guess of the
// threshold, lowered, stands for the smallest upper where fewer than `room` exceed it. Where the result is not sure the
// plain encoder serves, as it does for a batch with a token that has no codes: it may be NaN, and NaN comes first.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "cuda/batchtopk_scan.h"
#include "cuda/encode_screened.h"

namespace gemmascope_fast {
inline namespace on_cuda {

// The entries to `best`, which is empty and has room for some; returns their number, or nothing where the plain encoder
// must serve, with `best` empty again. `least` is a guess. Waits twice, and again for each overflow and for a guess that
// failed.
std::optional<int64_t> batchtopk_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                          const Tensor& bias, std::optional<float> least,
                                          const Tensor& bytes, BatchBest& best,
                                          cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
