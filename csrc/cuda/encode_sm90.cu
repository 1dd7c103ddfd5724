// Host side of encode_sm90_kernel.cuh: which problems it serves, tensor maps, launch.
//
// libcuda is not linked: the one driver function needed is asked of the runtime.
#include <map>
#include <mutex>
#include <optional>

#include "cuda/encode_sm90.h"
#include "cuda/encode_sm90_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

constexpr int64_t kGroupTokens = 2048;  // rows of tiles that sweep the latents together
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1024;  // coordinates of a tensor copy are int32

using EncodeMap = decltype(&cuTensorMapEncodeTiled);

struct Device {
  bool serves = false;
  int processors = 0;
  EncodeMap encode_map = nullptr;
};

const void* kernel_of(Dtype dtype, Limit limit) {
  if (limit == Limit::kScreened) {
    return reinterpret_cast<const void*>(&encode_sm90_kernel<int8_t, Limit::kScreened>);
  }
  if (limit == Limit::kUpperBound) {
    return reinterpret_cast<const void*>(&encode_sm90_kernel<int8_t, Limit::kUpperBound>);
  }
  const bool half = dtype == Dtype::kFloat16;
  if (limit == Limit::kPerLatent) {
    return half ? reinterpret_cast<const void*>(&encode_sm90_kernel<__half, Limit::kPerLatent>)
                : reinterpret_cast<const void*>(
                      &encode_sm90_kernel<__nv_bfloat16, Limit::kPerLatent>);
  }
  return half ? reinterpret_cast<const void*>(&encode_sm90_kernel<__half, Limit::kPerToken>)
              : reinterpret_cast<const void*>(&encode_sm90_kernel<__nv_bfloat16, Limit::kPerToken>);
}

EncodeMap find_encode_map() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              12000, cudaEnableDefault, &result);
  const bool usable = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<EncodeMap>(found) : nullptr;
}

// Raises the kernel's limit of shared memory. No answer: a question failed. False without 9.0a code, seen by the
// registers: the accumulators alone are 128.
std::optional<bool> prepare_kernel(const void* kernel) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return std::nullopt;
  if (attributes.numRegs < 128) return false;
  const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSm90SharedBytes);
  return raised == cudaSuccess ? std::optional<bool>(true) : std::nullopt;
}

std::optional<Device> ask_device(int device) {
  Device found;
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
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const Limit limit :
         {Limit::kPerLatent, Limit::kPerToken, Limit::kScreened, Limit::kUpperBound}) {
      const std::optional<bool> ready = prepare_kernel(kernel_of(dtype, limit));
      if (!ready) return std::nullopt;
      if (!*ready) return found;
    }
  }
  found.serves = true;
  return found;
}

// The current device. What it answered is kept; a question that failed is asked again at the next call, and its error
// is none of the launches to come.
Device this_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    if (const std::optional<Device> asked = ask_device(device)) return known[device] = *asked;
  }
  cudaGetLastError();
  return {};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of x and W.
struct Element {
  CUtensorMapDataType type;
  int64_t bytes;
  int64_t line() const { return 16 / bytes; }  // elements between which rows may begin
};

Element element_of(Dtype dtype, Limit limit) {
  if (multiplies_codes(limit)) return {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
  return {
      dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2};
}

// Of a single row the stride means nothing.
int64_t row_stride(const Element& element, int64_t rows, int64_t d, int64_t stride) {
  return rows > 1 ? stride : ceil_div(d, element.line()) * element.line();
}

bool rows_fit(const Element& element, const void* data, int64_t rows, int64_t d, int64_t stride) {
  const int64_t used = row_stride(element, rows, d, stride);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows >= 1 && rows <= kMostRows &&
         used >= d && used % element.line() == 0 && used < (int64_t{1} << 39);
}

bool make_map(EncodeMap encode, CUtensorMap* map, const Element& element, const void* data,
              int64_t rows, int64_t d, int64_t stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {
      static_cast<cuuint64_t>(row_stride(element, rows, d, stride) * element.bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kSm90RowBytes / element.bytes),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode(map, element.type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int64_t tile_rows(const EncodeTiles& p) { return ceil_div(p.n, kSm90Tokens); }
int64_t tile_columns(const EncodeTiles& p) { return ceil_div(p.last - p.first, kSm90Latents); }

// `kernel` is an encode_sm90_kernel of these elements.
cudaError_t launch(const Device& device, const void* kernel, const EncodeTiles& p,
                   const Element& element, cudaStream_t stream) {
  const int64_t rows = tile_rows(p), columns = tile_columns(p);
  // Groups of almost one size: a last group of a single row would read all of W for itself.
  const int64_t groups = ceil_div(rows * kSm90Tokens, kGroupTokens);
  const Sm90Raster raster = {static_cast<uint32_t>(rows), static_cast<uint32_t>(columns),
                             static_cast<uint32_t>(ceil_div(rows, groups))};
  CUtensorMap x, W;
  if (!make_map(device.encode_map, &x, element, p.x, p.n, p.d, p.x_stride, kSm90Tokens) ||
      !make_map(device.encode_map, &W, element, p.W, p.last, p.d, p.W_stride, kSm90Latents)) {
    return cudaErrorInvalidValue;
  }
  const int64_t most = device.processors, tiles = rows * columns;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles < most ? tiles : most));
  config.blockDim = dim3(kSm90Threads);
  config.dynamicSmemBytes = kSm90SharedBytes;
  config.stream = stream;
  void* arguments[] = {&x, &W, const_cast<EncodeTiles*>(&p), const_cast<Sm90Raster*>(&raster)};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace

bool encode_sm90_serves(const EncodeTiles& p, Dtype dtype, Limit limit) {
  const Element element = element_of(dtype, limit);
  if (dtype == Dtype::kFloat32 && !multiplies_codes(limit)) return false;
  if (p.d < 1 || p.d > kMostRows) return false;
  if (p.first < 0 || p.first % kSm90Latents != 0 || p.first >= p.last || p.last > p.d_sae) {
    return false;
  }
  return rows_fit(element, p.x, p.n, p.d, p.x_stride) &&
         rows_fit(element, p.W, p.last, p.d, p.W_stride) &&
         tile_rows(p) * tile_columns(p) < (int64_t{1} << 31) && this_device().serves;
}

cudaError_t encode_sm90(const EncodeTiles& p, Dtype dtype, Limit limit, cudaStream_t stream) {
  if (!encode_sm90_serves(p, dtype, limit)) return cudaErrorNotSupported;
  return launch(this_device(), kernel_of(dtype, limit), p, element_of(dtype, limit), stream);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
