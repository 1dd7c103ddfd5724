// Memory for results, of either device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace gemmascope_fast {

// By torch's C function: torch::stable::new_empty looks the operator up by its name, which takes 1 us more, and an encoder
// returns seven tensors.
inline Tensor empty_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                           ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(),
                                                   static_cast<int64_t>(sizes.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

}  // namespace gemmascope_fast
