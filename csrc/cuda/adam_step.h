// One step of Adam on a checked matrix, from a gradient in memory.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace gemmascope_fast {

struct AdamView;  // adam_row.cuh

// gradient [r, c] of any float dtype and strides, on the stream's device. Does not wait.
void adam_step_rows(const char* op, const AdamView& view, const Tensor& gradient,
                    cudaStream_t stream);

}  // namespace gemmascope_fast
