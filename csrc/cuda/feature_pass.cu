// Launches of the feature-major pass whose sums are stored as gradients.
#include "cuda/by_feature.h"
#include "cuda/feature_pass.h"
#include "cuda/feature_slabs.cuh"
#include "cuda/latent_order_kernel.cuh"

namespace gemmascope_fast {
namespace {

constexpr int64_t kSlab = int64_t{kFeatureChunks} * kChunk;  // columns of rows that do not fit

Tensor sorted_records(const char* op, const FeatureEntries& in, int64_t d_sae) {
  const int64_t capacity = in.rows.capacity;
  const Tensor records = torch::stable::new_empty(in.rows.indices, {capacity, 4});
  if (capacity == 0) return records;
  LatentOrder p;
  p.offsets = in.rows.offsets_data();
  p.feature_offsets = static_cast<const int64_t*>(in.feature_offsets.data_ptr());
  p.permutation = static_cast<const int64_t*>(in.permutation.data_ptr());
  p.values = floats(in.values);
  p.gate = floats(in.gate);
  p.d_values = floats(in.d_values);
  p.m = in.rows.n;
  p.d_sae = d_sae;
  p.capacity = capacity;
  p.records = static_cast<Record*>(records.data_ptr());
  const int64_t blocks = (capacity + kOrderThreads - 1) / kOrderThreads;
  latent_order_kernel<<<static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20)), kOrderThreads, 0,
                        current_stream(op, records)>>>(p);
  check_launch(op);
  return records;
}

// Both launches of one pass that fits.
void launch(const char* op, FeaturePass p, const FeatureShape& shape,
            const StoreGradients& gradients, const Tensor& like) {
  const cudaStream_t stream = current_stream(op, like);
  const Tensor pieces = feature_pieces(like, &p);
  check_cuda(op, "later pieces", launch_feature_pieces(p, shape, stream));
  check_cuda(op, "feature pass", launch_feature_pass(p, shape, gradients, stream));
}

FeatureShape shape_of(const char* op, const FeaturePass& p) {
  FeatureShape shape;
  check_cuda(op, "device attributes", feature_shape_here(p, &shape));
  return shape;
}

void launch_slab(const char* op, const FeaturePass& p, const StoreGradients& gradients,
                 const Tensor& like) {
  const FeatureShape shape = shape_of(op, p);
  if (shape.K == 0) fail(op, "this device has too little shared memory for rows of ", kSlab);
  launch(op, p, shape, gradients, like);
}

}  // namespace

FeatureEntries feature_entries(const char* op, const DeviceEntries& entries, int64_t d_sae,
                               const std::optional<Tensor>& feature_offsets,
                               const std::optional<Tensor>& permutation,
                               const std::optional<Tensor>& values,
                               const std::optional<Tensor>& gate,
                               const std::optional<Tensor>& d_values,
                               const std::optional<Tensor>& d_gate) {
  FeatureEntries in;
  in.rows = entries;
  in.values = numbers_of(op, "values", values, entries);
  in.gate = numbers_of(op, "gate", gate, entries);
  in.d_values = numbers_of(op, "d_values", d_values, entries);
  in.d_gate = numbers_of(op, "d_gate", d_gate, entries);
  if (feature_offsets.has_value() && permutation.has_value()) {
    in.feature_offsets = vector_of(op, "feature_offsets", *feature_offsets, ScalarType::Long,
                                   d_sae + 1, entries.offsets);
    in.permutation = vector_of(op, "permutation", *permutation, ScalarType::Long, entries.capacity,
                               entries.offsets);
  } else {
    std::tie(in.feature_offsets, in.permutation) =
        by_feature_cuda(entries.offsets, entries.indices, d_sae);
  }
  return in;
}

FeaturePass feature_pass_of(const char* op, FeatureEntries& entries, int64_t d_sae) {
  entries.records = sorted_records(op, entries, d_sae);
  FeaturePass p = {};
  p.feature_offsets = static_cast<const int64_t*>(entries.feature_offsets.data_ptr());
  p.permutation = static_cast<const int64_t*>(entries.permutation.data_ptr());
  p.indices = entries.rows.indices_data();
  p.records = static_cast<Record*>(entries.records.data_ptr());
  p.capacity = entries.rows.capacity;
  p.d_sae = d_sae;
  p.last = d_sae;
  p.n = entries.rows.n;
  p.d_gate = floats(entries.d_gate);
  return p;
}

void want_threshold(FeaturePass* p, const Tensor& threshold, double bandwidth,
                    const Tensor& d_threshold) {
  p->threshold = floats(threshold);
  p->bandwidth = static_cast<float>(bandwidth);
  p->half = static_cast<float>(bandwidth / 2);
  p->d_threshold = mutable_floats(d_threshold);
}

Tensor feature_pieces(const Tensor& like, FeaturePass* p) {
  const Tensor pieces = new_floats(like, feature_windows(*p) * feature_piece_size(*p));
  p->pieces = static_cast<float*>(pieces.data_ptr());
  return pieces;
}

cudaError_t feature_shape_here(const FeaturePass& p, FeatureShape* shape,
                               int (*blocks)(int K, int capability)) {
  int device = 0, per_block = 0, per_processor = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int* answer, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(answer, attribute, device);
  };
  ask(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  if (status == cudaSuccess) {
    *shape = feature_shape(p, per_block, per_processor, blocks, 10 * major + minor);
  }
  return status;
}

cudaError_t launch_feature_pieces(FeaturePass p, FeatureShape shape, cudaStream_t stream) {
  p.stages = shape.stages;
  const int64_t windows = feature_windows(p);
  if (windows == 0 || p.first == p.last) return cudaSuccess;
  switch (shape.K) {
    case 1:
      return launch_feature_kernel(&feature_pieces_kernel<1>, windows, shape, stream, p);
    case 2:
      return launch_feature_kernel(&feature_pieces_kernel<2>, windows, shape, stream, p);
    case 3:
      return launch_feature_kernel(&feature_pieces_kernel<3>, windows, shape, stream, p);
    default:
      return launch_feature_kernel(&feature_pieces_kernel<4>, windows, shape, stream, p);
  }
}

void store_gradients(const char* op, FeaturePass p, const StoreGradients& gradients,
                     const Tensor& like) {
  const FeatureShape shape = shape_of(op, p);
  if (shape.K != 0) {
    launch(op, p, shape, gradients, like);
    return;
  }
  store_in_slabs(p, gradients, kSlab, [&](const FeaturePass& part, const StoreGradients& slab) {
    launch_slab(op, part, slab, like);
  });
}

RowGradient::RowGradient(const Tensor& parameter, bool transpose)
    : gradient_(torch::stable::empty_like(parameter)),
      rows_(transpose ? transposed(gradient_) : gradient_),
      transpose_(transpose),
      buffered_(false) {
  if (rows_.is_contiguous()) return;
  buffered_ = true;
  rows_ = torch::stable::new_empty(parameter, {rows_.size(0), rows_.size(1)});
}

Tensor RowGradient::finish() {
  if (buffered_) {
    Tensor features = transpose_ ? transposed(gradient_) : gradient_;
    torch::stable::copy_(features, rows_);
  }
  return gradient_;
}

}  // namespace gemmascope_fast
