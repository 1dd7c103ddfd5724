// Host side of encode_sm90_kernel.cuh: which problems it serves, tensor maps, launch.
#include "cuda/encode_sm90.h"
#include "cuda/encode_sm90_kernel.cuh"
#include "cuda/sm90_device.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

constexpr int64_t kGroupTokens = 2048;  // rows of tiles that sweep the latents together

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

Sm90Device this_device() {
  static Sm90Devices devices(
      {kernel_of(Dtype::kBFloat16, Limit::kPerLatent),
       kernel_of(Dtype::kFloat16, Limit::kPerLatent), kernel_of(Dtype::kBFloat16, Limit::kPerToken),
       kernel_of(Dtype::kFloat16, Limit::kPerToken), kernel_of(Dtype::kBFloat16, Limit::kScreened),
       kernel_of(Dtype::kBFloat16, Limit::kUpperBound)},
      kSm90SharedBytes);
  return devices.current();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Sm90Element element_of(Dtype dtype, Limit limit) {
  if (multiplies_codes(limit)) return {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
  return {
      dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2};
}

int64_t tile_rows(const EncodeTiles& p) { return ceil_div(p.n, kSm90Tokens); }
int64_t tile_columns(const EncodeTiles& p) { return ceil_div(p.last - p.first, kSm90Latents); }

// `kernel` is an encode_sm90_kernel of these elements.
cudaError_t launch(const Sm90Device& device, const void* kernel, const EncodeTiles& p,
                   const Sm90Element& element, cudaStream_t stream) {
  const int64_t rows = tile_rows(p), columns = tile_columns(p);
  // Groups of almost one size: a last group of a single row would read all of W for itself.
  const int64_t groups = ceil_div(rows * kSm90Tokens, kGroupTokens);
  const Sm90Raster raster = {static_cast<uint32_t>(rows), static_cast<uint32_t>(columns),
                             static_cast<uint32_t>(ceil_div(rows, groups))};
  CUtensorMap x, W;
  if (!sm90_map(device, &x, element, p.x, p.n, p.d, p.x_stride, kSm90Tokens) ||
      !sm90_map(device, &W, element, p.W, p.last, p.d, p.W_stride, kSm90Latents)) {
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
  const Sm90Element element = element_of(dtype, limit);
  if (dtype == Dtype::kFloat32 && !multiplies_codes(limit)) return false;
  if (p.first < 0 || p.first % kSm90Latents != 0 || p.first >= p.last || p.last > p.d_sae) {
    return false;
  }
  return sm90_rows_fit(element, p.x, p.n, p.d, p.x_stride) &&
         sm90_rows_fit(element, p.W, p.last, p.d, p.W_stride) &&
         tile_rows(p) * tile_columns(p) < (int64_t{1} << 31) && this_device().serves;
}

cudaError_t encode_sm90(const EncodeTiles& p, Dtype dtype, Limit limit, cudaStream_t stream) {
  if (!encode_sm90_serves(p, dtype, limit)) return cudaErrorNotSupported;
  return launch(this_device(), kernel_of(dtype, limit), p, element_of(dtype, limit), stream);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
