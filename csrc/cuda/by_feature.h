// by_feature for the other host wrappers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/check.h"

namespace gemmascope_fast {

std::tuple<Tensor, Tensor> by_feature_cuda(const Tensor& offsets, const Tensor& indices,
                                           int64_t d_sae);

// feature_offsets and permutation of an encoder's result, or two tensors of size 0 when they were not asked for.
inline std::tuple<Tensor, Tensor> feature_view_cuda(bool wanted, const Tensor& offsets,
                                                    const Tensor& indices, int64_t d_sae) {
  if (wanted) return by_feature_cuda(offsets, indices, d_sae);
  return {torch::stable::new_empty(offsets, {0}), torch::stable::new_empty(offsets, {0})};
}

}  // namespace gemmascope_fast
