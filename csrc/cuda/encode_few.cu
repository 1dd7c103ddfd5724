#include "cuda/encode_few.h"
#include "cuda/encode_few_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

template <typename T>
const void* kernel_of(Limit limit) {
  return limit == Limit::kPerLatent
             ? reinterpret_cast<const void*>(&encode_few_kernel<T, Limit::kPerLatent>)
             : reinterpret_cast<const void*>(&encode_few_kernel<T, Limit::kPerToken>);
}

}  // namespace

bool encode_few_serves(const EncodeTiles& p, Dtype dtype, Limit limit) {
  return p.n <= kStripTokens && dtype != Dtype::kFloat32 && !multiplies_codes(limit);
}

cudaError_t encode_few(const EncodeTiles& p, Dtype dtype, Limit limit, cudaStream_t stream) {
  const void* kernel =
      dtype == Dtype::kFloat16 ? kernel_of<__half>(limit) : kernel_of<__nv_bfloat16>(limit);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kFewShared);
  if (status == cudaSuccess) {  // kFewBlocks share a multiprocessor
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
  }
  if (status != cudaSuccess) return status;
  const int64_t blocks = (p.last - p.first + kFewLatents - 1) / kFewLatents;  // below 2^25
  EncodeTiles copy = p;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kFewThreads), arguments,
                          kFewShared, stream);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
