// torch's CUDA half is found at run time, so that one library serves CPU-only builds of torch as well: linking the
// symbol would make the import fail there, and a weak reference would silently stay null.
#include "cuda/runtime.h"

#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <sstream>
#include <string>

#include "common/check.h"

namespace gemmascope_fast {
namespace {

constexpr int kOldestMajor = 8;  // cp.async, mma.m16n8k16 of bfloat16, reductions over a warp

using GetStream = int32_t (*)(int32_t device_index, void** stream);

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

std::string described(int device) {
  cudaDeviceProp properties;
  std::ostringstream text;
  text << "cuda:" << device;
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    text << " (" << properties.name << ", compute capability " << properties.major << '.'
         << properties.minor << ')';
  }
  cudaGetLastError();
  return text.str();
}

// Page-locked memory that no Readback uses. None is freed: that waits for the device, and fails while another thread
// captures a CUDA graph.
class Pages {
 public:
  static constexpr size_t kBytes = 4096;

  static Pages& all() {
    static Pages& pages = *new Pages;  // threads may outlive what is destroyed at exit
    return pages;
  }
  char* take(const char* op) {
    {
      const std::lock_guard<std::mutex> lock(in_use_);
      if (!idle_.empty()) {
        char* page = idle_.back();
        idle_.pop_back();
        return page;
      }
    }
    void* page = nullptr;
    // Else a capture, this thread's or another's, forbids it and is lost.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(op, "page-locked memory", cudaThreadExchangeStreamCaptureMode(&mode));
    const cudaError_t status = cudaHostAlloc(&page, kBytes, cudaHostAllocPortable);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check_cuda(op, "page-locked memory", status);
    return static_cast<char*>(page);
  }
  void give_back(char* page) {
    const std::lock_guard<std::mutex> lock(in_use_);
    idle_.push_back(page);
  }

 private:
  std::mutex in_use_;
  std::vector<char*> idle_;
};

}  // namespace

void check_capability(const char* op, int device) {
  int major = 0;
  check_cuda(op, "asking for the compute capability",
             cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major >= kOldestMajor) return;
  fail(op, described(device), " is too old: the CUDA kernels need compute capability ",
       kOldestMajor, ".0; move the tensors to the CPU, or set GEMMASCOPE_FAST_BACKEND=reference");
}

cudaStream_t current_stream(const char* op, const Tensor& t) {
  static const GetStream get_stream = find_get_stream();
  if (get_stream == nullptr) {
    fail(op,
         "got a CUDA tensor, but libtorch_cuda.so is not loaded or has no "
         "aoti_torch_get_current_cuda_stream; install a CUDA build of torch >= 2.11");
  }
  check_capability(op, t.get_device_index());
  void* stream = nullptr;
  if (get_stream(t.get_device_index(), &stream) != 0) {
    fail(op, "torch could not name the current stream of device ", t.get_device_index());
  }
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here: check_launch of the next op must not find it again
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
      fail(op, what, ": this build has no kernels for ", described(device),
           "; build it with CUDAARCHS of that capability, or set GEMMASCOPE_FAST_BACKEND=triton");
    }
  }
  fail(op, what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

// A page whose copies may still be on their way, since the op failed before it waited, is not used again.
Readback::~Readback() {
  if (end_ != nullptr) cudaEventDestroy(end_);
  if (page_ != nullptr && parts_.empty()) Pages::all().give_back(page_);
}

void Readback::read(void* to, const void* from, size_t bytes) {
  char* at = nullptr;
  if (used_ + bytes <= Pages::kBytes) {
    if (page_ == nullptr) page_ = Pages::all().take(op_);
    at = page_ + used_;
    used_ += bytes;
  }
  parts_.push_back({to, at, bytes});
  check_cuda(
      op_, "reading a size",
      cudaMemcpyAsync(at != nullptr ? at : to, from, bytes, cudaMemcpyDeviceToHost, stream_));
}

void Readback::end() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another thread's capture goes on
  check_cuda(op_, "an event", cudaThreadExchangeStreamCaptureMode(&mode));
  const cudaError_t status = cudaEventCreateWithFlags(&end_, cudaEventDisableTiming);
  cudaThreadExchangeStreamCaptureMode(&mode);
  check_cuda(op_, "an event", status);
  check_cuda(op_, "an event", cudaEventRecord(end_, stream_));
}

void Readback::wait() {
  check_cuda(op_, "waiting for a size",
             end_ == nullptr ? cudaStreamSynchronize(stream_) : cudaEventSynchronize(end_));
  for (const Part& part : parts_) {
    if (part.from != nullptr) memcpy(part.to, part.from, part.bytes);
  }
  parts_.clear();
  used_ = 0;
}

void check_launch(const char* op) { check_cuda(op, "kernel launch", cudaGetLastError()); }

}  // namespace gemmascope_fast
