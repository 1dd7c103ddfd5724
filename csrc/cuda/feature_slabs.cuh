// A feature-major pass whose rows do not fit, as passes over slabs of their columns.
//
// First the decoder's part, slab by slab: the gradients of the entries grow with every slab, in their records. Then the
// encoder's. Each entry's rows are read once, its record once per slab.
#pragma once

#include "cuda/feature_pass_kernel.cuh"

namespace gemmascope_fast {

template <class Launch>
void store_decoder_slabs(const FeaturePass& whole, const StoreGradients& gradients, int64_t slab,
                         const Launch& launch) {
  for (int64_t begin = 0; begin < whole.g.cols; begin += slab) {
    const int64_t cols = whole.g.cols - begin < slab ? whole.g.cols - begin : slab;
    FeaturePass p = whole;
    p.encoder = 0;
    p.g = columns_of(whole.g, begin, cols);
    if (p.dots) p.W_dec = columns_of(whole.W_dec, begin, cols);
    p.d_b_enc = p.d_threshold = p.d_pre = nullptr;
    if (begin + cols < whole.g.cols) p.d_values = nullptr;
    p.keep_gradients = 1;
    StoreGradients part = {};
    if (gradients.d_W_dec.data != nullptr) {
      part.d_W_dec = columns_of(gradients.d_W_dec, begin, cols);
    }
    launch(p, part);
  }
}

// The sums over entries come with the first slab.
template <class Launch>
void store_encoder_slabs(const FeaturePass& whole, const StoreGradients& gradients, int64_t slab,
                         const Launch& launch) {
  FeaturePass p = whole;
  p.decoder = p.dots = 0;
  p.d_values = nullptr;
  int64_t begin = 0;
  do {
    StoreGradients part = {};
    if (p.encoder) {
      const int64_t cols = whole.x.cols - begin < slab ? whole.x.cols - begin : slab;
      p.x = columns_of(whole.x, begin, cols);
      part.d_W_enc = columns_of(gradients.d_W_enc, begin, cols);
    }
    launch(p, part);
    p.d_b_enc = p.d_threshold = p.d_pre = nullptr;
    begin += slab;
  } while (p.encoder && begin < whole.x.cols);
}

// launch(p, gradients) runs one pass that fits.
template <class Launch>
void store_in_slabs(const FeaturePass& p, const StoreGradients& gradients, int64_t slab,
                    const Launch& launch) {
  if (p.decoder) store_decoder_slabs(p, gradients, slab, launch);
  const bool sums = p.d_b_enc != nullptr || p.d_threshold != nullptr || p.d_pre != nullptr;
  if (p.encoder || sums) store_encoder_slabs(p, gradients, slab, launch);
}

}  // namespace gemmascope_fast
