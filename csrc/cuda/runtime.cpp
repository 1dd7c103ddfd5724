// torch's CUDA half is found at run time, so that one library serves CPU-only builds of torch as well: linking the symbol
// would make the import fail there, and a weak reference would silently stay null.
#include "cuda/runtime.h"

#include <dlfcn.h>

#include "common/check.h"

namespace gemmascope_fast {
namespace {

using GetStream = int32_t (*)(int32_t device_index, void** stream);

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

cudaStream_t current_stream(const char* op, const Tensor& t) {
  static const GetStream get_stream = find_get_stream();
  if (get_stream == nullptr) {
    fail(op,
         "got a CUDA tensor, but libtorch_cuda.so is not loaded or has no "
         "aoti_torch_get_current_cuda_stream; install a CUDA build of torch >= 2.11");
  }
  void* stream = nullptr;
  if (get_stream(t.get_device_index(), &stream) != 0) {
    fail(op, "torch could not name the current stream of device ", t.get_device_index());
  }
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here: check_launch of the next op must not find it again
  fail(op, what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

void check_launch(const char* op) { check_cuda(op, "kernel launch", cudaGetLastError()); }

}  // namespace gemmascope_fast
