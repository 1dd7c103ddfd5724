// The arguments of one matrix under Adam, checked by the CPU's half of the library, as the device code takes them.
#pragma once

#include "common/check.h"

namespace gemmascope_fast {

struct AdamView;  // adam_row.cuh

// weight [r, c], one row per latent (W_enc transposed); `name` is the weight's in messages. The tensors of `state` must
// be on the weight's device. Fills *view.
void adam_view(const char* op, const char* name, const Tensor& weight,
               const std::vector<Tensor>& state, const std::vector<double>& rates,
               const std::vector<int64_t>& rule, AdamView* view);

}  // namespace gemmascope_fast
