// The arguments that sae_backward and fused_sparse_step share, checked and made ready for the feature-major pass.
#pragma once

#include "cpu/feature_pass.h"

namespace gemmascope_fast {

struct SaeInputs {
  Entries entries;
  FeatureView view;
  DecoderPart decoder;  // without d_W_dec
  EncoderPart encoder;  // without outputs
  int64_t sets = 1;
};

SaeInputs sae_inputs(const char* op, const Tensor& x, const Tensor& W_enc,
                     const std::optional<Tensor>& threshold, double bandwidth, const Tensor& W_dec,
                     const Tensor& d_recon, const std::vector<int64_t>& group_ends,
                     const Tensor& offsets, const Tensor& indices, const Tensor& values,
                     const Tensor& gate, const std::optional<Tensor>& d_values,
                     const std::optional<Tensor>& d_gate, const Tensor& feature_offsets,
                     const Tensor& permutation);

}  // namespace gemmascope_fast
