#include "cuda/encode_few.h"
#include "cuda/topk_few_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

template <typename T>
const void* kernel_of(Limit limit) {
  return limit == Limit::kPerLatent
             ? reinterpret_cast<const void*>(&encode_few_kernel<T, Limit::kPerLatent>)
             : reinterpret_cast<const void*>(&encode_few_kernel<T, Limit::kPerToken>);
}

// A block per 64 latents.
cudaError_t launch(const void* kernel, const EncodeTiles& p, void** arguments,
                   cudaStream_t stream) {
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kFewShared);
  if (status == cudaSuccess) {  // kFewBlocks share a multiprocessor
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
  }
  if (status != cudaSuccess) return status;
  const int64_t blocks = (p.last - p.first + kFewLatents - 1) / kFewLatents;  // below 2^25
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kFewThreads), arguments,
                          kFewShared, stream);
}

}  // namespace

bool encode_few_serves(const EncodeTiles& p, Dtype dtype, Limit limit) {
  return p.n <= kStripTokens && dtype != Dtype::kFloat32 && !multiplies_codes(limit);
}

cudaError_t encode_few(const EncodeTiles& p, Dtype dtype, Limit limit, cudaStream_t stream) {
  EncodeTiles copy = p;
  void* arguments[] = {&copy};
  return launch(
      dtype == Dtype::kFloat16 ? kernel_of<__half>(limit) : kernel_of<__nv_bfloat16>(limit), p,
      arguments, stream);
}

cudaError_t few_keys(const EncodeTiles& p, Dtype dtype, const FewKeys& out, cudaStream_t stream) {
  EncodeTiles tiles = p;
  FewKeys keys = out;
  void* arguments[] = {&tiles, &keys};
  return launch(dtype == Dtype::kFloat16
                    ? reinterpret_cast<const void*>(&few_keys_kernel<__half>)
                    : reinterpret_cast<const void*>(&few_keys_kernel<__nv_bfloat16>),
                p, arguments, stream);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
