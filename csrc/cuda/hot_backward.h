// Host half of the hot/cold split of sae_backward (hot_latents.cuh): gradients of the hot latents as dense products.
#pragma once

#include "cuda/sae_inputs.h"

namespace gemmascope_fast {

// What the pass reads of the split; alive until it has been launched.
struct HotSplit {
  Tensor state, slots;
};

// Launches the products for the latents that turn out to be hot enough, and makes the pass leave those out. Launches
// nothing, and returns nothing, where shapes, dtypes or the device say that it cannot pay. The pass comes afterwards,
// on the same stream: it serves all latents whose products failed. fused_sparse_step has no split: where this one
// serves, its bits are no longer those of sae_backward and adam_step_.
std::optional<HotSplit> split_hot(const char* op, const SaeInputs& in,
                                  const StoreGradients& gradients, const Tensor& like,
                                  FeaturePass* pass);

}  // namespace gemmascope_fast
