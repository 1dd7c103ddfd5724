// The arguments that sae_backward and fused_sparse_step share, checked, and the gradients that each group of latents
// sees.
#pragma once

#include <functional>
#include <vector>

#include "cuda/feature_pass.h"

namespace gemmascope_fast {
inline namespace on_cuda {

struct SaeInputs {
  FeatureEntries entries;  // on sets * n rows
  int64_t d_sae, n, sets;
  Tensor x, W_dec;   // columns adjacent
  Tensor threshold;  // with a bandwidth
  double bandwidth;
  Tensor d_recon;  // [G, m, d_out]
  std::vector<int64_t> group_ends;
};

SaeInputs sae_inputs_cuda(const char* op, const Tensor& x, const Tensor& W_enc,
                          const std::optional<Tensor>& threshold, double bandwidth,
                          const Tensor& W_dec, const Tensor& d_recon,
                          const std::vector<int64_t>& group_ends, const Tensor& offsets,
                          const Tensor& indices, const Tensor& values, const Tensor& gate,
                          const std::optional<Tensor>& d_values,
                          const std::optional<Tensor>& d_gate, const Tensor& feature_offsets,
                          const Tensor& permutation);

// Whether both weight gradients and the dot products are clearly faster as dense products (dense_products.h).
bool sae_dense_pays(const SaeInputs& in, const Tensor& W_dec);

// The pass with both parts; d_b_enc [d_sae], d_threshold [d_sae] with a bandwidth.
FeaturePass sae_pass(const char* op, SaeInputs& in, const Tensor& d_b_enc,
                     const Tensor& d_threshold);

// run(p) for the latents between two ends, the last ones first, with p.first, p.last and p.g set: S, the sum of
// d_recon[g] over the groups that hold them. S is d_recon itself for the last group, then one float32 buffer.
void for_groups(const char* op, const SaeInputs& in, FeaturePass p,
                const std::function<void(const FeaturePass&)>& run);

}  // namespace on_cuda
}  // namespace gemmascope_fast
