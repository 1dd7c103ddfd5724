// libcuda is not linked: the one driver function needed is asked of the runtime.
#include "cuda/sm90_device.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kRowBytes = 128;
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1024;  // coordinates of a tensor copy are int32

decltype(&cuTensorMapEncodeTiled) find_encode_map() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              12000, cudaEnableDefault, &result);
  const bool usable = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
}

// Of a single row the stride means nothing.
int64_t row_stride(const Sm90Element& element, int64_t rows, int64_t d, int64_t stride) {
  return rows > 1 ? stride : (d + element.line() - 1) / element.line() * element.line();
}

}  // namespace

// Raises the kernel's limit of shared memory. No answer: a question failed. False without 9.0a code, seen by the
// registers: the accumulators alone are 128.
std::optional<bool> Sm90Devices::prepare(const void* kernel) const {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return std::nullopt;
  if (attributes.numRegs < 128) return false;
  const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_);
  return raised == cudaSuccess ? std::optional<bool>(true) : std::nullopt;
}

std::optional<Sm90Device> Sm90Devices::ask(int device) const {
  Sm90Device found;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess) {
    return std::nullopt;
  }
  if (major != 9 || minor != 0) return found;
  found.encode_map = find_encode_map();
  if (found.encode_map == nullptr) return std::nullopt;
  for (const void* kernel : kernels_) {
    const std::optional<bool> ready = prepare(kernel);
    if (!ready) return std::nullopt;
    if (!*ready) return found;
  }
  found.serves = true;
  return found;
}

Sm90Device Sm90Devices::current() {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(device);
    if (found != known_.end()) return found->second;
    if (const std::optional<Sm90Device> asked = ask(device)) return known_[device] = *asked;
  }
  cudaGetLastError();
  return {};
}

bool sm90_rows_fit(const Sm90Element& element, const void* data, int64_t rows, int64_t d,
                   int64_t stride) {
  const int64_t used = row_stride(element, rows, d, stride);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows >= 1 && rows <= kMostRows && d >= 1 &&
         d <= kMostRows && used >= d && used % element.line() == 0 && used < (int64_t{1} << 39);
}

bool sm90_map(const Sm90Device& device, CUtensorMap* map, const Sm90Element& element,
              const void* data, int64_t rows, int64_t d, int64_t stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {
      static_cast<cuuint64_t>(row_stride(element, rows, d, stride) * element.bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kRowBytes / element.bytes),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return device.encode_map(map, element.type, 2, const_cast<void*>(data), sizes, strides, box,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace gemmascope_fast
