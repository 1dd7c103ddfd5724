// The walk over a latent's entries that all kernels of the feature-major pass share.
//
// A thread copies its chunks of the next entries' rows into shared memory and reads only what it copied itself, so that
// the one barrier per batch of entries is that of the dot products.
#pragma once

#include "cuda/feature_slots.cuh"

namespace gemmascope_fast {

// ---- pieces

__device__ inline Piece latent_piece(const FeaturePass& p, int64_t latent) {
  Piece piece;
  piece.latent = latent;
  piece.begin = p.feature_offsets[latent];
  piece.end = p.feature_offsets[latent + 1];
  if (piece.begin < 0) piece.begin = 0;
  if (piece.end > p.capacity) piece.end = p.capacity;
  piece.start = piece.begin;
  const int64_t left = piece.end - piece.start;
  piece.count = left <= 0 ? 0 : left < kSegment ? static_cast<int>(left) : kSegment;
  return piece;
}

__device__ inline Piece window_piece(const FeaturePass& p, int64_t window) {
  Piece none = {};
  const int64_t at = window * kSegment;
  if (at >= p.feature_offsets[p.d_sae] || at >= p.capacity) return none;
  const int64_t e = p.permutation[at];
  if (e < 0 || e >= p.capacity) return none;
  const int64_t latent = p.indices[e];
  if (latent < p.first || latent >= p.last) return none;
  Piece piece = latent_piece(p, latent);
  piece.start = piece.begin + (window - piece.begin / kSegment) * kSegment;
  const int64_t left = piece.end - piece.start;
  if (piece.start <= piece.begin || left <= 0) return none;
  piece.count = left < kSegment ? static_cast<int>(left) : kSegment;
  return piece;
}

// ---- the walk over the entries of a piece

// Sums of one thread. `bias` and `window` are whole in every thread of the first warp.
template <int K>
struct FeatureSums {
  float enc[K][kChunk], dec[K][kChunk];
  float bias, window;
};

// Starts the copies of a batch of entries; `slot` is that of its first.
template <int K, bool kEven>
__device__ inline void start_batch(const FeaturePass& p, const Slots& s,
                                   const FeatureShared& shared, int batch, int slot, int count) {
  constexpr int B = feature_batch(K);
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const int i = batch * B + b;
    const int32_t token = i < count ? shared.records[i].token : -1;
    if (token < 0) continue;
    uint4* to = entry_slot<K>(s, slot + b);
    if (kEven) {
      const int64_t row = token < p.n ? token : token % static_cast<int32_t>(p.n);
      copy_even_row<K>(p.g, token, to, s);
      copy_even_row<K>(p.x, row, to + K * s.threads, s);
      continue;
    }
    if (p.decoder) copy_row<K>(p.g, token, to, s, s.g_words);
    if (p.encoder) {
      const int64_t row = token < p.n ? token : token % static_cast<int32_t>(p.n);
      copy_row<K>(p.x, row, to + K * s.g_words * s.threads, s, s.x_words);
    }
  }
}

// Adds value g[r] to the decoder's sums; returns this thread's part of <W_dec[j], g[r]>. bfloat16 has code of its own,
// in which nothing is asked between the reads.
template <int K>
__device__ inline float decoder_entry(const FeaturePass& p, const Slots& s, const uint4* slot,
                                      float value, FeatureSums<K>* sums) {
  float dot = 0.0f;
  if (s.fast_decoder) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float g[kChunk], w[kChunk];
      widen_bf16(slot[k * s.threads], g);
      widen_bf16(s.base[k * s.threads], w);
      add_chunk(value, g, sums->dec[k]);
      dot = dot_chunk(w, g, dot);
    }
    return dot;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float g[kChunk];
    read_chunk(slot + k * s.g_words * s.threads, s.threads, s.g_words, s.g_dtype, g);
    add_chunk(value, g, sums->dec[k]);
    if (p.dots) {
      float w[kChunk];
      read_chunk(s.base + k * s.w_words * s.threads, s.threads, s.w_words, s.w_dtype, w);
      dot = dot_chunk(w, g, dot);
    }
  }
  return dot;
}

template <int K>
__device__ inline void encoder_entry(const Slots& s, const uint4* slot, float d_pre,
                                     FeatureSums<K>* sums) {
  slot += K * s.g_words * s.threads;
  if (s.fast_encoder) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float x[kChunk];
      widen_bf16(slot[k * s.threads], x);
      add_chunk(d_pre, x, sums->enc[k]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float x[kChunk];
    read_chunk(slot + k * s.x_words * s.threads, s.threads, s.x_words, s.x_dtype, x);
    add_chunk(d_pre, x, sums->enc[k]);
  }
}

// One batch whose rows have arrived. Its dot products go to shared.gradients.
template <int K, bool kEven>
__device__ inline void walk_batch(const FeaturePass& p, const Slots& s, FeatureShared& shared,
                                  int batch, int slot, int count, FeatureSums<K>* sums) {
  constexpr int B = feature_batch(K);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool decoder = kEven || p.decoder, dots = kEven || p.dots, encoder = kEven || p.encoder;
  if (decoder) {
    float* partial = reinterpret_cast<float*>(shared.partial[batch % 2]);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      const int i = batch * B + b;
      if (i >= count || shared.records[i].token < 0) continue;
      const float value = shared.records[i].value;
      float dot = decoder_entry<K>(p, s, entry_slot<K>(s, slot + b), value, sums);
      if (!dots) continue;
      dot = warp_sum(dot);
      if (lane == 0) partial[b * kFeatureWarps + warp] = dot;
    }
  }
  // The next batch writes the other half of `partial`, and its barrier comes after all reads of this one.
  if (dots) __syncthreads();
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const int i = batch * B + b;
    if (i >= count || shared.records[i].token < 0) continue;
    float gradient = shared.records[i].gradient;
    if (dots) {
      const float4 low = shared.partial[batch % 2][b][0], high = shared.partial[batch % 2][b][1];
      gradient += ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
      if (threadIdx.x == 0) shared.gradients[i] = gradient;
    }
    if (encoder) {
      const float d_pre = gradient * shared.records[i].gate;
      encoder_entry<K>(s, entry_slot<K>(s, slot + b), d_pre, sums);
    }
  }
}

// What is known of every entry once the dot products are: written out, and summed by the first warp.
__device__ inline void finish_entries(const FeaturePass& p, const Piece& piece,
                                      FeatureShared& shared, float* bias, float* window) {
  *bias = 0.0f;
  *window = 0.0f;
  __syncthreads();  // shared.gradients; and nobody reads rows from shared memory any more
  const bool first_warp = threadIdx.x < kWarp;
  const float theta = p.d_threshold != nullptr && first_warp ? p.threshold[piece.latent] : 0.0f;
  const bool scatter = p.d_values != nullptr || p.d_pre != nullptr;
  const bool sums = p.d_b_enc != nullptr || p.d_threshold != nullptr;
  if (scatter || p.keep_gradients) {
    for (int i = threadIdx.x; i < piece.count; i += blockDim.x) {
      const Record record = shared.records[i];
      if (record.token < 0) continue;
      const float gradient = p.dots ? shared.gradients[i] : record.gradient;
      if (p.keep_gradients) p.records[piece.start + i].gradient = gradient;
      if (!scatter) continue;
      const int64_t e = p.permutation[piece.start + i];
      if (p.d_values != nullptr) p.d_values[e] = gradient;
      if (p.d_pre != nullptr) p.d_pre[e] = gradient * record.gate;
    }
  }
  if (!sums || !first_warp) return;
  for (int i = threadIdx.x; i < piece.count; i += kWarp) {
    const Record record = shared.records[i];
    if (record.token < 0) continue;
    const float gradient = p.dots ? shared.gradients[i] : record.gradient;
    *bias += gradient * record.gate;
    if (p.d_threshold == nullptr || !(record.gate == 0.0f || record.value < theta + p.half))
      continue;
    const float d_gate = p.d_gate != nullptr ? p.d_gate[p.permutation[piece.start + i]] : 0.0f;
    *window += theta * gradient + d_gate;
  }
  *bias = warp_sum(*bias);
  *window = warp_sum(*window);
}

template <int K, bool kEven>
__device__ inline void start_walk(const FeaturePass& p, const Slots& s, const FeatureShared& shared,
                                  int count) {
  constexpr int B = feature_batch(K);
  for (int batch = 0; batch < p.stages; ++batch) {
    start_batch<K, kEven>(p, s, shared, batch, batch * B, count);
    async_commit();
  }
}

template <int K, bool kEven>
__device__ inline void walk_batches(const FeaturePass& p, const Slots& s, FeatureShared& shared,
                                    int count, FeatureSums<K>* sums) {
  constexpr int B = feature_batch(K);
  const int batches = (count + B - 1) / B;
  int slot = 0;
  for (int batch = 0; batch < batches; ++batch) {
    async_wait(p.stages - 1);
    walk_batch<K, kEven>(p, s, shared, batch, slot, count, sums);
    start_batch<K, kEven>(p, s, shared, batch + p.stages, slot, count);
    async_commit();
    slot = slot + B == p.stages * B ? 0 : slot + B;
  }
}

// Sums over the entries of one piece; at least one. `meanwhile` is called while the first rows are on their way.
template <int K, class Meanwhile>
__device__ inline void walk_piece(const FeaturePass& p, const Piece& piece, uint4* memory,
                                  FeatureShared& shared, FeatureSums<K>* sums,
                                  const Meanwhile& meanwhile) {
  const Slots s = feature_slots(p, memory);
  for (int i = threadIdx.x; i < piece.count; i += blockDim.x) {
    shared.records[i] = p.records[piece.start + i];
  }
  // Warps that a CTA does not have count as zeros.
  for (int i = threadIdx.x; i < 2 * 4 * kFeatureWarps; i += blockDim.x) {
    reinterpret_cast<float*>(shared.partial)[i] = 0.0f;
  }
  clear_slots<K>(p, s);
  if (p.dots) copy_row<K>(p.W_dec, piece.latent, s.base, s, s.w_words);
  __syncthreads();
  const bool even = even_rows<K>(p);
  if (even) {
    start_walk<K, true>(p, even_slots<K>(p, memory), shared, piece.count);
  } else {
    start_walk<K, false>(p, s, shared, piece.count);
  }
  meanwhile();
  if (even) {
    walk_batches<K, true>(p, even_slots<K>(p, memory), shared, piece.count, sums);
  } else {
    walk_batches<K, false>(p, s, shared, piece.count, sums);
  }
  finish_entries(p, piece, shared, &sums->bias, &sums->window);
}

template <int K>
__device__ inline void clear_sums(FeatureSums<K>* sums) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums->enc[k][i] = sums->dec[k][i] = 0.0f;
  }
  sums->bias = sums->window = 0.0f;
}

}  // namespace gemmascope_fast
