// Device code of the gradients that nested prefixes see: out [m, d] = later + own, in float32. Bound by 4 + 4 + 4 bytes
// an element.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {

constexpr int kGroupThreads = 256;

__global__ void __launch_bounds__(kGroupThreads)
    group_sums_kernel(Rows later, Rows own, float* out) {
  for (int64_t row = blockIdx.x; row < own.rows; row += gridDim.x) {
    for (int64_t col = threadIdx.x; col < own.cols; col += blockDim.x) {
      const float a =
          load_element(later.data, later.dtype, row * later.row_stride + col * later.col_stride);
      const float b =
          load_element(own.data, own.dtype, row * own.row_stride + col * own.col_stride);
      out[row * own.cols + col] = a + b;
    }
  }
}

}  // namespace gemmascope_fast
