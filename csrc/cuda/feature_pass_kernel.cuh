// Device code of the feature-major pass: the gradients of one latent from a single reading of its tokens' rows.
//
//   gradient[e] = d_values[e] + <W_dec[j], g[r]>,   d_W_dec[j] = sum values[e] g[r]                  decoder part
//   d_W_enc[j] = sum gradient[e] gate[e] x[r % n],  d_b_enc[j] = sum gradient[e] gate[e],            encoder part
//   d_threshold[j] = -(1 / bandwidth) sum in_window[e] (threshold[j] gradient[e] + d_gate[e])
//   over the entries e of latent j, rows r = row of e ascending; W_dec, g [m, d_out], x [n, d_in]
//
// One CTA per latent. A thread owns K chunks of 8 columns of every row and keeps both sums of them in registers; the
// rows of the next entries are on their way into shared memory, where each thread reads only what it copied itself, so
// that the one barrier per batch of entries is that of the dot products. Segments beyond kSegment entries are cut at
// fixed places: the later pieces go through a float32 workspace and are added in order (arXiv 2407.14435 for the
// threshold). What becomes of the finished sums is a template parameter: stored as gradients, or used up by an update
// of the row.
//
// In flight per multiprocessor at d = 5376 in 16 bits: 2 CTAs x 3 to 4 entries x 21.5 KB, where 3.3 TB/s need 17 KB.
// Bound by reading nnz rows of g and of x, and by writing both gradients.
#pragma once

#include "cuda/feature_walk.cuh"

namespace gemmascope_fast {

// ---- later pieces through memory

template <int K>
__device__ inline void store_columns(float* to, int64_t cols, const float (&v)[K][kChunk]) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!holds<K>(cols, k, blockDim.x)) return;
    uint4* at = reinterpret_cast<uint4*>(to) + 2 * (k * blockDim.x + threadIdx.x);
    at[0] = pack_fp32(v[k]);
    at[1] = pack_fp32(v[k] + 4);
  }
}

template <int K>
__device__ inline void add_columns(const float* from, int64_t cols, float (&v)[K][kChunk]) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!holds<K>(cols, k, blockDim.x)) return;
    const float4* at = reinterpret_cast<const float4*>(from) + 2 * (k * blockDim.x + threadIdx.x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 part = at[half];
      v[k][4 * half] += part.x;
      v[k][4 * half + 1] += part.y;
      v[k][4 * half + 2] += part.z;
      v[k][4 * half + 3] += part.w;
    }
  }
}

template <int K>
__device__ inline void add_pieces(const FeaturePass& p, const Piece& piece, FeatureSums<K>* sums) {
  int more = static_cast<int>((piece.end - piece.begin - 1) / kSegment);
  const float* from = p.pieces + (piece.begin / kSegment + 1) * feature_piece_size(p);
#pragma unroll 1
  for (; more > 0; --more) {
    if (p.encoder) {
      add_columns<K>(from, p.x.cols, sums->enc);
      from += padded_columns(p.x.cols);
    }
    if (p.decoder) {
      add_columns<K>(from, p.g.cols, sums->dec);
      from += padded_columns(p.g.cols);
    }
    sums->bias += from[0];
    sums->window += from[1];
    from += kChunk;
  }
}

// Sums the pieces behind the first one of every latent that has any; one CTA per window.
template <int K>
__global__ void __launch_bounds__(feature_threads(K), feature_blocks(K, kCapability))
    feature_pieces_kernel(FeaturePass p) {
  GSF_DYNAMIC_SHARED(uint4, memory);
  __shared__ FeatureShared shared;
  const Piece piece = window_piece(p, blockIdx.x);
  if (piece.count == 0 || is_hot(p.hot_slots, p.hot, piece.latent)) return;
  FeatureSums<K> sums;
  clear_sums(&sums);
  walk_piece<K>(p, piece, memory, shared, &sums, [] {});
  float* to = p.pieces + static_cast<int64_t>(blockIdx.x) * feature_piece_size(p);
  if (p.encoder) {
    store_columns<K>(to, p.x.cols, sums.enc);
    to += padded_columns(p.x.cols);
  }
  if (p.decoder) {
    store_columns<K>(to, p.g.cols, sums.dec);
    to += padded_columns(p.g.cols);
  }
  if (threadIdx.x == 0) {
    to[0] = sums.bias;
    to[1] = sums.window;
  }
}

// ---- the pass

// Finish: what becomes of the sums of a latent, called by all threads of its CTA, after `feature_pieces_kernel`.
//
//   static constexpr int blocks(int K, int capability)            CTAs per multiprocessor, as feature_blocks
//   struct Shared                                                 what its threads share, at most kFinishShared bytes
//   __device__ void begin(int64_t latent, Shared* shared) const   while the first rows of the walk are on their way
//   template <int K> __device__ void operator()(int64_t latent, int64_t entries, FeatureSums<K>& sums,
//                                               uint4* memory, Shared* shared) const
//
// Thread t holds columns (k threads + t) kChunk .. + 7 of both rows, zeros beyond the last. `memory`, the dynamic
// shared memory, is free: with both parts it has room for both rows in float32. A latent without entries has sums of
// zero, and no begin.
template <int K, class Finish>
__global__ void __launch_bounds__(feature_threads(K), Finish::blocks(K, kCapability))
    feature_pass_kernel(FeaturePass p, Finish finish) {
  GSF_DYNAMIC_SHARED(uint4, memory);
  __shared__ FeatureShared shared;
  __shared__ typename Finish::Shared kept;
  static_assert(sizeof(kept) <= kFinishShared, "no room");
  const int64_t latent = p.first + blockIdx.x;
  const Piece piece = latent_piece(p, latent);
  if (is_hot(p.hot_slots, p.hot, latent) & (piece.count > 0)) return;  // one wait for all loads
  FeatureSums<K> sums;
  clear_sums(&sums);
  if (piece.count > 0) {
    walk_piece<K>(p, piece, memory, shared, &sums, [&] { finish.begin(latent, &kept); });
    add_pieces<K>(p, piece, &sums);
  }
  if (threadIdx.x == 0) {
    if (p.d_b_enc != nullptr) p.d_b_enc[latent] = sums.bias;
    if (p.d_threshold != nullptr) p.d_threshold[latent] = sums.window / -p.bandwidth;
  }
  finish.template operator()<K>(latent, piece.end - piece.begin, sums, memory, &kept);
}

// Gradients in the dtype of the parameters, one row per latent; data null: not wanted.
struct StoreGradients {
  Target d_W_enc, d_W_dec;

  struct Shared {};

  static constexpr int blocks(int K, int capability) { return feature_blocks(K, capability); }
  __device__ void begin(int64_t, Shared*) const {}

  template <int K>
  __device__ void store(const Target& out, int64_t latent, const float (&v)[K][kChunk]) const {
    if (out.data == nullptr) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t col = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * kChunk;
      if (col < out.cols) store_target(out, latent, col, v[k]);
    }
  }

  template <int K>
  __device__ void operator()(int64_t latent, int64_t, FeatureSums<K>& sums, uint4*, Shared*) const {
    store<K>(d_W_dec, latent, sums.dec);
    store<K>(d_W_enc, latent, sums.enc);
  }
};

}  // namespace gemmascope_fast
