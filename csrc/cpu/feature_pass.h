// The feature-major pass of every backward op: latent by latent, each entry's rows are read once and each gradient row is
// written once.
//
//   decoder part   d_values[e] = <W_dec[j], g[row e]>,  d_W_dec[j] += values[e] g[row e]
//   encoder part   d_pre[e] = d_values[e] gate[e],  d_W_enc[j] += d_pre[e] x[row e % n],  d_b_enc[j] += d_pre[e],
//                  d_threshold[j] -= in_window[e] (threshold[j] d_values[e] + d_gate[e]) / bandwidth
//
// With both parts the encoder's d_values are the decoder's plus the given ones. A finished gradient row is written, or
// consumed at once by an update of that row of the weights.
#pragma once

#include "cpu/entries.h"
#include "cpu/gradient_rows.h"

namespace gemmascope_fast {

struct DecoderPart {
  std::optional<Matrix> W_dec;      // null: no value gradients
  std::vector<FloatRows> d_recon;   // [G] of [m, d_out], already suffix-summed
  std::vector<int64_t> group_ends;  // [G]
  LatentGradient d_W_dec;
  float* d_values = nullptr;  // [capacity], written when not null
};

struct EncoderPart {
  FloatRows x;  // [n, d_in]
  int64_t n = 0;
  std::optional<LatentGradient> d_W_enc;
  const float* d_values = nullptr;  // [capacity] each
  const float* d_gate = nullptr;
  const float* threshold = nullptr;  // [d_sae], null unless d_threshold is wanted
  double bandwidth = 0;
  float* d_b_enc = nullptr;      // [d_sae]
  float* d_threshold = nullptr;  // [d_sae]
  float* d_pre = nullptr;        // [capacity]
};

// The row of every entry [0, nnz), int64.
Tensor entry_rows(const Entries& entries, const Tensor& like);

void feature_pass(const Entries& entries, const FeatureView& view, const int64_t* rows,
                  const DecoderPart* decoder, const EncoderPart* encoder);

// The view the caller passed, checked, or a fresh one when it passed none.
FeatureView feature_view(const char* op, const Tensor& offsets, const Tensor& indices,
                         const std::optional<Tensor>& feature_offsets,
                         const std::optional<Tensor>& permutation, const Entries& entries);

}  // namespace gemmascope_fast
