// Host half of the feature-major pass (feature_pass_kernel.cuh): what every op that uses it prepares.
#pragma once

#include "cuda/feature_pass_launch.cuh"
#include "cuda/operands.h"

namespace gemmascope_fast {

// The entries of a pass as tensors; numbers that are absent count as zeros.
struct FeatureEntries {
  DeviceEntries rows;
  Tensor feature_offsets, permutation;  // contiguous
  std::optional<Tensor> values, gate, d_values, d_gate;
  Tensor records;  // [capacity][4]: Record, of feature_pass_of
};

// Checks the numbers and the view, or makes the view when the caller passed none.
FeatureEntries feature_entries(const char* op, const DeviceEntries& entries, int64_t d_sae,
                               const std::optional<Tensor>& feature_offsets,
                               const std::optional<Tensor>& permutation,
                               const std::optional<Tensor>& values,
                               const std::optional<Tensor>& gate,
                               const std::optional<Tensor>& d_values,
                               const std::optional<Tensor>& d_gate);

// A pass over all latents without parts; the caller adds what it wants. Sorts the numbers by latent.
FeaturePass feature_pass_of(const char* op, FeatureEntries& entries, int64_t d_sae);

void want_threshold(FeaturePass* p, const Tensor& threshold, double bandwidth,
                    const Tensor& d_threshold);

// Room for the sums of later pieces; p->pieces points into it.
Tensor feature_pieces(const Tensor& like, FeaturePass* p);

// Gradients of one latent after the other, rows that do not fit in slabs of columns. Without a part its target is
// unused.
void store_gradients(const char* op, FeaturePass p, const StoreGradients& gradients,
                     const Tensor& like);

// A gradient in the dtype and strides of its parameter, written one contiguous row per latent: in itself, or in a
// buffer that `finish` transposes at streaming speed (a row would be d isolated elements).
class RowGradient {
 public:
  // `transpose`: rows are the parameter's columns (W_enc).
  RowGradient(const Tensor& parameter, bool transpose);
  Target target() const { return target_of(rows_); }
  Tensor finish();

 private:
  Tensor gradient_, rows_;
  bool transpose_, buffered_;
};

}  // namespace gemmascope_fast
