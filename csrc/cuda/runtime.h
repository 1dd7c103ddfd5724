// What every CUDA host wrapper needs from torch and from the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <vector>

namespace gemmascope_fast {

// The stream torch currently uses on the tensor's device. Throws when this torch has no CUDA, or the device is too old.
cudaStream_t current_stream(const char* op, const torch::stable::Tensor& t);

// Throws with the device's name where no kernel of this library runs on it.
void check_capability(const char* op, int device);

// Throws with the op's name and CUDA's text unless `status` is success.
void check_cuda(const char* op, const char* what, cudaError_t status);

// Call after each launch: reports an impossible configuration, not a fault inside the kernel.
void check_launch(const char* op);

// Numbers that the host waits for. They pass through page-locked memory, so that several cost one wait: a copy to other
// memory waits by itself.
class Readback {
 public:
  Readback(const char* op, cudaStream_t stream) : op_(op), stream_(stream) {}
  ~Readback();
  Readback(const Readback&) = delete;
  Readback& operator=(const Readback&) = delete;

  // `to` is written by wait().
  void read(void* to, const void* from, size_t bytes);
  // What the stream is given from here on is not waited for.
  void end();
  void wait();

 private:
  struct Part {
    void* to;
    const char* from;  // null: it went there at once
    size_t bytes;
  };
  const char* op_;
  cudaStream_t stream_;
  char* page_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::vector<Part> parts_;  // not waited for yet
  size_t used_ = 0;
};

}  // namespace gemmascope_fast
