// The feature-major view of a batch's entries, for the encoders and the backward ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace gemmascope_fast {

// offsets [n + 1] int64, indices [capacity] int32 -> feature_offsets [d_sae + 1], permutation
// [capacity], both int64. Checks both arguments.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> by_feature_cpu(
    const torch::stable::Tensor& offsets, const torch::stable::Tensor& indices, int64_t d_sae);

}  // namespace gemmascope_fast
