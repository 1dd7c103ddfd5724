// The row of an entry.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {

// The last i < n with offsets[i] <= e.
__device__ inline int64_t row_of_entry(const int64_t* offsets, int64_t n, int64_t e) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (__ldg(offsets + middle) <= e) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace gemmascope_fast
