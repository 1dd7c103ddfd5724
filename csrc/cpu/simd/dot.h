// The canonical dot product and what surrounds it, one table of functions per SIMD target.
#pragma once

#include <stdint.h>

#include "cpu/simd_target.h"

namespace gemmascope_fast {

struct DotTable {
  // Rows one panel takes at most.
  int64_t tile_rows;

  // out[r * out_stride + j] = <x row r, w row j> for r < rows <= tile_rows, j < latents; d is a
  // multiple of 16 and the rows are zero padded. state: rows * latents * 16 floats of scratch, used
  // when d exceeds one cache block.
  void (*panel)(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t w_stride,
                int64_t latents, int64_t d, float* state, float* out, int64_t out_stride);

  // out[i] = <x[i], w[i]> for i < count, the same bits as `panel`; dtype, of the rows w, is csrc/common/matrix.h's. Of all pairs
  // `block` elements come first, a multiple of 16, then the next ones. state: count * 16 floats of scratch, used when d exceeds
  // block.
  void (*pairs)(const float* const* x, const void* const* w, int dtype, int64_t count, int64_t d,
                int64_t block, float* state, float* out);

  // With pre = dots[j] + bias[j]: lists the j (ascending) for which pre <= limit[j * limit_stride]
  // does not hold (so NaN is listed), with their pre. Both lists need room for count + 16 elements.
  // Returns how many there are.
  int64_t (*above)(const float* dots, const float* bias, const float* limit, int64_t limit_stride,
                   int64_t count, int32_t* position, float* pre);

  // target[i] = float(source[i]); dtype is csrc/common/matrix.h's.
  void (*widen)(const void* source, int dtype, int64_t count, float* target);

  // target[c * target_stride + r] = float(source[r * source_stride + c]) for r < rows, c < cols.
  void (*transpose)(const void* source, int64_t source_stride, int dtype, int64_t rows,
                    int64_t cols, float* target, int64_t target_stride);
};

// Call only where simd_target_available(target).
const DotTable& dot_table(SimdTarget target);

}  // namespace gemmascope_fast
