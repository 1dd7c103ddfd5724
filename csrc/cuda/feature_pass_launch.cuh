// Launches of the feature-major pass: torch-free, for every op that finishes a latent's rows in its own way.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/feature_pass_kernel.cuh"
#include "cuda/shared_limit.h"

namespace gemmascope_fast {

template <class Parameters, class... More>
cudaError_t launch_feature_kernel(void (*kernel)(Parameters, More...), int64_t blocks,
                                  const FeatureShape& shape, cudaStream_t stream,
                                  const Parameters& p, const More&... more) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const int own = static_cast<int>(sizeof(FeatureShared)) + kFinishShared;
  cudaError_t status = raise_shared_limit(function, own);
  if (status != cudaSuccess) return status;
  // Left to itself the driver may keep more of the memory for the L1 than several blocks leave over.
  status = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<Parameters*>(&p), const_cast<More*>(&more)...};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(shape.threads)), arguments,
                          static_cast<size_t>(shape.bytes), stream);
}

// Shape of a pass on the current device; K is 0 when its rows do not fit. `blocks`: its Finish's.
cudaError_t feature_shape_here(const FeaturePass& p, FeatureShape* shape,
                               int (*blocks)(int K, int capability) = &feature_blocks);

// The sums of later pieces, into p.pieces [feature_windows(p)][feature_piece_size(p)].
cudaError_t launch_feature_pieces(FeaturePass p, FeatureShape shape, cudaStream_t stream);

// Latents [p.first, p.last), after launch_feature_pieces with the same p and shape.
template <class Finish>
cudaError_t launch_feature_pass(FeaturePass p, const FeatureShape& shape, const Finish& finish,
                                cudaStream_t stream) {
  p.stages = shape.stages;
  const int64_t blocks = p.last - p.first;
  if (blocks <= 0) return cudaSuccess;
  switch (shape.K) {
    case 1:
      return launch_feature_kernel(&feature_pass_kernel<1, Finish>, blocks, shape, stream, p,
                                   finish);
    case 2:
      return launch_feature_kernel(&feature_pass_kernel<2, Finish>, blocks, shape, stream, p,
                                   finish);
    case 3:
      return launch_feature_kernel(&feature_pass_kernel<3, Finish>, blocks, shape, stream, p,
                                   finish);
    default:
      return launch_feature_kernel(&feature_pass_kernel<4, Finish>, blocks, shape, stream, p,
                                   finish);
  }
}

}  // namespace gemmascope_fast
