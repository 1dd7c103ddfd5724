// by_feature on CUDA: host wrapper of by_feature_kernel.cuh.
//
//   indices [capacity] -> feature_offsets [d_sae + 1], permutation [capacity]
//
// Never waits for the device; a latent out of range is left out of every segment instead of raising.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cub/device/device_radix_sort.cuh>
#include <limits>
#include <tuple>

#include "common/check.h"
#include "cuda/by_feature_kernel.cuh"
#include "cuda/runtime.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "by_feature";

void check_arguments(const Tensor& offsets, const Tensor& indices, int64_t d_sae) {
  check_dim(kOp, "offsets", offsets, 1);
  check_dim(kOp, "indices", indices, 1);
  check_dtype(kOp, "offsets", offsets, ScalarType::Long);
  check_dtype(kOp, "indices", indices, ScalarType::Int);
  if (offsets.size(0) < 1) fail(kOp, "offsets must have n + 1 elements, got shape [0]");
  if (!offsets.is_cuda() || !indices.is_cuda() ||
      offsets.get_device_index() != indices.get_device_index()) {
    fail(kOp, "offsets and indices must be on one CUDA device");
  }
  if (d_sae < 0 || d_sae > std::numeric_limits<int32_t>::max()) {
    fail(kOp, "d_sae must be in [0, 2^31), got ", d_sae);
  }
}

// With workspace null only *bytes, the sort's need, is set.
cudaError_t by_feature_sort(const ByFeature& p, void* workspace, size_t* bytes,
                            cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(workspace, *bytes, p.keys, p.keys + p.capacity,
                                         p.positions, p.permutation, p.capacity, 0,
                                         by_feature_key_bits(p.d_sae), stream);
}

void launch(const ByFeature& p, const Tensor& like, cudaStream_t stream) {
  if (p.capacity > 0) {
    by_feature_keys_kernel<<<by_feature_blocks(p.capacity), kByFeatureThreads, 0, stream>>>(p);
    check_launch(kOp);
    size_t bytes = 0;
    check_cuda(kOp, "sizing the sort", by_feature_sort(p, nullptr, &bytes, stream));
    const Tensor workspace =
        torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    // CUB takes a null workspace for a question about its size.
    if (bytes > 0) {
      check_cuda(kOp, "sort", by_feature_sort(p, workspace.data_ptr(), &bytes, stream));
    }
  }
  by_feature_bounds_kernel<<<by_feature_blocks(p.d_sae + 1), kByFeatureThreads, 0, stream>>>(p);
  check_launch(kOp);
  if (p.capacity > 0) {
    by_feature_padding_kernel<<<by_feature_blocks(p.capacity), kByFeatureThreads, 0, stream>>>(p);
    check_launch(kOp);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> by_feature_cuda(const Tensor& offsets_in, const Tensor& indices_in,
                                           int64_t d_sae) {
  check_arguments(offsets_in, indices_in, d_sae);
  const torch::stable::accelerator::DeviceGuard guard(offsets_in.get_device_index());
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor indices = torch::stable::contiguous(indices_in);
  const int64_t capacity = indices.size(0);
  Tensor feature_offsets = torch::stable::new_empty(offsets, {d_sae + 1}, ScalarType::Long);
  Tensor permutation = torch::stable::new_empty(offsets, {capacity}, ScalarType::Long);
  const Tensor keys = torch::stable::new_empty(indices, {2 * capacity}, ScalarType::Int);
  const Tensor positions = torch::stable::new_empty(offsets, {capacity}, ScalarType::Long);
  ByFeature p;
  p.offsets = static_cast<const int64_t*>(offsets.data_ptr());
  p.indices = static_cast<const int32_t*>(indices.data_ptr());
  p.n = offsets.size(0) - 1;
  p.capacity = capacity;
  p.d_sae = d_sae;
  p.keys = static_cast<uint32_t*>(keys.data_ptr());
  p.positions = static_cast<int64_t*>(positions.data_ptr());
  p.feature_offsets = static_cast<int64_t*>(feature_offsets.data_ptr());
  p.permutation = static_cast<int64_t*>(permutation.data_ptr());
  launch(p, offsets, current_stream(kOp, offsets));
  return {feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("by_feature", TORCH_BOX(&by_feature_cuda));
}

}  // namespace gemmascope_fast
