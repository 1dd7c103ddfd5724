// The walk over a latent's entries that all kernels of the feature-major pass share.
//
// A thread copies its chunks of the next entries' rows into shared memory and reads only what it copied itself, so that
// the one barrier per batch of entries is that of the dot products.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/feature_pass.cuh"

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

// ---- a thread's chunks in shared memory

// The 16-byte words of one entry: K chunks of g, then K of x, of 1 or 2 words; word w of thread t lies at w threads +
// t.
struct Slots {
  uint4* base;  // of this thread
  int threads;
  int w_words, g_words, x_words;    // per chunk, 0 for what is not read
  int w_dtype, g_dtype, x_dtype;    // of the chunks there
  bool fast_decoder, fast_encoder;  // all of it bfloat16, with dot products
};

__device__ inline Slots feature_slots(const FeaturePass& p, uint4* shared) {
  Slots s;
  s.base = shared + threadIdx.x;
  s.threads = blockDim.x;
  s.w_words = p.dots ? chunk_words(p.W_dec) : 0;
  s.g_words = p.decoder ? chunk_words(p.g) : 0;
  s.x_words = p.encoder ? chunk_words(p.x) : 0;
  s.w_dtype = chunk_dtype(p.W_dec);
  s.g_dtype = chunk_dtype(p.g);
  s.x_dtype = chunk_dtype(p.x);
  s.fast_decoder = p.dots && s.w_dtype == kBFloat16 && s.g_dtype == kBFloat16;
  s.fast_encoder = p.encoder && s.x_dtype == kBFloat16;
  return s;
}

template <int K>
__device__ inline uint4* entry_slot(const Slots& s, int slot) {
  return s.base + K * (s.w_words + slot * (s.g_words + s.x_words)) * s.threads;
}

// Whether chunk k of this thread lies in rows of `cols` columns.
template <int K>
__device__ inline bool holds(int64_t cols, int k, int threads) {
  return (k * threads + static_cast<int>(threadIdx.x)) * kChunk < cols;
}

// Rows that are not wide, element by element and as little code as possible; 0 beyond the last column.
template <int K>
__device__ inline void copy_narrow_row(const Rows& m, int64_t row, uint4* to, const Slots& s) {
#pragma unroll 1
  for (int i = 0; i < K * kChunk; ++i) {
    const int word = i / 4;
    const int64_t col =
        (static_cast<int64_t>(i / kChunk) * s.threads + threadIdx.x) * kChunk + i % kChunk;
    const int64_t at = row * m.row_stride + col * m.col_stride;
    reinterpret_cast<float*>(to + word * s.threads)[i % 4] =
        col < m.cols ? load_element(m.data, m.dtype, at) : 0.0f;
  }
}

template <int K>
__device__ inline void copy_row(const Rows& m, int64_t row, uint4* to, const Slots& s, int words) {
  if (!m.wide) {
    copy_narrow_row<K>(m, row, to, s);
    return;
  }
  const char* from = first_chunk(m, static_cast<int64_t>(threadIdx.x) * kChunk) +
                     static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes(m);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!holds<K>(m.cols, k, s.threads)) return;
    async_copy_16(to, from, words == 2);
    if (words == 2) async_copy_16(to + s.threads, from + 16, true);
    to += words * s.threads;
    from += s.threads * words * 16;
  }
}

// Zeros where the chunks of a thread lie beyond the row, so that nobody asks about them later.
template <int K>
__device__ inline void clear_row(const Rows& m, uint4* to, const Slots& s, int words) {
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    if (words == 0 || holds<K>(m.cols, k, s.threads)) continue;
    for (int word = 0; word < words; ++word) {
      to[(k * words + word) * s.threads] = make_uint4(0, 0, 0, 0);
    }
  }
}

template <int K>
__device__ inline void clear_slots(const FeaturePass& p, const Slots& s) {
  if ((!p.decoder || holds<K>(p.g.cols, K - 1, s.threads)) &&
      (!p.encoder || holds<K>(p.x.cols, K - 1, s.threads))) {
    return;
  }
  clear_row<K>(p.W_dec, s.base, s, s.w_words);
#pragma unroll 1
  for (int slot = 0; slot < p.stages * feature_batch(K); ++slot) {
    uint4* to = entry_slot<K>(s, slot);
    clear_row<K>(p.g, to, s, s.g_words);
    clear_row<K>(p.x, to + K * s.g_words * s.threads, s, s.x_words);
  }
}

__device__ inline void read_chunk(const uint4* slot, int threads, int words, int dtype,
                                  float (&out)[kChunk]) {
  const uint4 first = slot[0];
  uint4 second = first;
  if (words == 2) second = slot[threads];
  widen_chunk(first, second, dtype, out);
}

// ---- the walk over the entries of a piece

// Sums of one thread. `bias` and `window` are whole in every thread of the first warp.
template <int K>
struct FeatureSums {
  float enc[K][kChunk], dec[K][kChunk];
  float bias, window;
};

// Starts the copies of a batch of entries; `slot` is that of its first.
template <int K>
__device__ inline void start_batch(const FeaturePass& p, const Slots& s,
                                   const FeatureShared& shared, int batch, int slot, int count) {
  constexpr int B = feature_batch(K);
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const int i = batch * B + b;
    const int32_t token = i < count ? shared.records[i].token : -1;
    if (token < 0) continue;
    uint4* to = entry_slot<K>(s, slot + b);
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
template <int K>
__device__ inline void walk_batch(const FeaturePass& p, const Slots& s, FeatureShared& shared,
                                  int batch, int slot, int count, FeatureSums<K>* sums) {
  constexpr int B = feature_batch(K);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (p.decoder) {
    float* partial = reinterpret_cast<float*>(shared.partial[batch % 2]);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      const int i = batch * B + b;
      if (i >= count || shared.records[i].token < 0) continue;
      const float value = shared.records[i].value;
      float dot = decoder_entry<K>(p, s, entry_slot<K>(s, slot + b), value, sums);
      if (!p.dots) continue;
      dot = warp_sum(dot);
      if (lane == 0) partial[b * kFeatureWarps + warp] = dot;
    }
  }
  // The next batch writes the other half of `partial`, and its barrier comes after all reads of this one.
  if (p.dots) __syncthreads();
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const int i = batch * B + b;
    if (i >= count || shared.records[i].token < 0) continue;
    float gradient = shared.records[i].gradient;
    if (p.dots) {
      const float4 low = shared.partial[batch % 2][b][0], high = shared.partial[batch % 2][b][1];
      gradient += ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
      if (threadIdx.x == 0) shared.gradients[i] = gradient;
    }
    if (p.encoder) {
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

// Sums over the entries of one piece; at least one. `meanwhile` is called while the first rows are on their way.
template <int K, class Meanwhile>
__device__ inline void walk_piece(const FeaturePass& p, const Piece& piece, uint4* memory,
                                  FeatureShared& shared, FeatureSums<K>* sums,
                                  const Meanwhile& meanwhile) {
  constexpr int B = feature_batch(K);
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
  const int batches = (piece.count + B - 1) / B;
  for (int batch = 0; batch < p.stages; ++batch) {
    start_batch<K>(p, s, shared, batch, batch * B, piece.count);
    async_commit();
  }
  meanwhile();
  int slot = 0;
  for (int batch = 0; batch < batches; ++batch) {
    async_wait(p.stages - 1);
    walk_batch<K>(p, s, shared, batch, slot, piece.count, sums);
    start_batch<K>(p, s, shared, batch + p.stages, slot, piece.count);
    async_commit();
    slot = slot + B == p.stages * B ? 0 : slot + B;
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
