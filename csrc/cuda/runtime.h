// What every CUDA host wrapper needs from torch and from the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

namespace gemmascope_fast {

// The stream torch currently uses on the tensor's device. Throws when this torch has no CUDA, or the device is too old.
cudaStream_t current_stream(const char* op, const torch::stable::Tensor& t);

// Throws with the device's name where no kernel of this library runs on it.
void check_capability(const char* op, int device);

// Throws with the op's name and CUDA's text unless `status` is success.
void check_cuda(const char* op, const char* what, cudaError_t status);

// Call after each launch: reports an impossible configuration, not a fault inside the kernel.
void check_launch(const char* op);

}  // namespace gemmascope_fast
