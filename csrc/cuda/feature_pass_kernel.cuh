// Device code of the feature-major pass: the gradients of one latent from a single reading of its tokens' rows.
//
//   gradient[e] = d_values[e] + <W_dec[j], g[r]>,   d_W_dec[j] = sum values[e] g[r]                  decoder part
//   d_W_enc[j] = sum gradient[e] gate[e] x[r % n],  d_b_enc[j] = sum gradient[e] gate[e],            encoder part
//   d_threshold[j] = -(1 / bandwidth) sum in_window[e] (threshold[j] gradient[e] + d_gate[e])
//   over the entries e of latent j, rows r = row of e ascending; W_dec, g [m, d_out], x [n, d_in]
//
// One CTA per latent. A thread owns K chunks of 8 columns of every row and keeps both sums of them in registers; the rows
// of the next entries are on their way into shared memory, where each thread reads only what it copied itself, so that
// the one barrier per batch of entries is that of the dot products. Segments beyond kSegment entries are cut at fixed
// places: the later pieces go through a float32 workspace and are added in order (arXiv 2407.14435 for the threshold).
// What becomes of the finished sums is a template parameter: stored as gradients, or used up by an update of the row.
//
// In flight per multiprocessor at d = 5376 in 16 bits: 3 CTAs x 1 to 2 entries x 21.5 KB, where 3.3 TB/s need 17 KB.
// Bound by reading nnz rows of g and of x, and by writing both gradients.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/rows.cuh"

namespace gemmascope_fast {

constexpr int kSegment = 256;        // entries of a piece
constexpr int kFeatureWarps = 8;     // at most
constexpr int kFeatureStages = 4;    // at most
constexpr int kFeatureChunks = 1024;  // of a row that fits: 8192 columns

// Chunks of columns per thread, K, and what follows from it.
__host__ __device__ constexpr int feature_threads(int K) { return K == 3 ? 224 : 256; }  // 3 x 224 chunks are 5376 columns
__host__ __device__ constexpr int feature_batch(int K) { return K == 1 ? 4 : K == 2 ? 2 : 1; }
__host__ __device__ constexpr int feature_blocks(int K) { return K == 1 ? 4 : K == 4 ? 2 : 3; }

// What the pass reads of an entry besides rows; entries are sorted by latent. No entry: token -1.
struct __align__(16) Record {
  int32_t token;
  float value, gate, gradient;
};

struct FeaturePass {
  const int64_t* feature_offsets;  // [d_sae + 1]
  const int64_t* permutation;      // [capacity]
  const int32_t* indices;          // [capacity], in the order of the entries, as d_gate, d_values and d_pre
  Record* records;                 // [capacity], in the order of the latents
  int64_t capacity, d_sae;
  int64_t first, last;  // the latents of this launch
  int64_t n;            // rows of x

  int decoder;  // read g, add to d_W_dec
  int dots;     // and add <W_dec[j], g[r]> to the gradient
  int encoder;  // read x, add to d_W_enc
  Rows W_dec, g, x;

  const float* threshold;  // [d_sae] with d_threshold
  const float* d_gate;     // [capacity], null for zeros
  float bandwidth, half;   // half of the bandwidth
  float* d_b_enc;          // [d_sae] each, or null
  float* d_threshold;
  float* d_values;     // [capacity]: the gradient, or null
  float* d_pre;        // [capacity]: the gradient times the gate, or null
  int keep_gradients;  // in the records, for a later launch

  float* pieces;  // [windows][feature_piece_size]
  int stages;     // batches of entries in shared memory
};

// What a CTA shares.
struct FeatureShared {
  Record records[kSegment];
  float gradients[kSegment];
  float4 partial[2][4][kFeatureWarps / 4];  // [batch % 2][entry of the batch][warp]
};

// Window w of the sorted entries covers positions [w kSegment, (w + 1) kSegment). At most one later piece starts in it, and
// its latent owns position w kSegment: pieces are found by window, without a list.
struct Piece {
  int64_t latent, begin, end;  // entries of the latent
  int64_t start;               // first entry of the piece
  int count;                   // entries of the piece, 0 when there is none
};

__host__ __device__ inline int64_t padded_columns(int64_t cols) {
  return (cols + kChunk - 1) / kChunk * kChunk;
}

// A piece's sums: d_W_enc, d_W_dec, d_b_enc, d_threshold.
__host__ __device__ inline int64_t feature_piece_size(const FeaturePass& p) {
  return (p.encoder ? padded_columns(p.x.cols) : 0) + (p.decoder ? padded_columns(p.g.cols) : 0) +
         kChunk;
}

__host__ __device__ inline int64_t feature_windows(const FeaturePass& p) {
  return p.capacity > kSegment ? (p.capacity + kSegment - 1) / kSegment : 0;
}

// ---- entries in the order of the latents

constexpr int kOrderThreads = 256;

struct LatentOrder {
  const int64_t* offsets;          // [m + 1]
  const int64_t* feature_offsets;  // [d_sae + 1]
  const int64_t* permutation;      // [capacity]
  const float *values, *gate, *d_values;  // [capacity], null for zeros
  int64_t m, d_sae, capacity;
  Record* records;  // [capacity]
};

__device__ inline float number_at(const float* source, int64_t e) {
  return source != nullptr ? source[e] : 0.0f;
}

__global__ void __launch_bounds__(kOrderThreads) latent_order_kernel(LatentOrder p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t nnz = p.offsets[p.m], stored = p.feature_offsets[p.d_sae];
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < p.capacity;
       at += step) {
    Record record = {-1, 0.0f, 0.0f, 0.0f};
    const int64_t e = at < stored ? p.permutation[at] : -1;
    if (e >= 0 && e < nnz && e < p.capacity) {
      int64_t low = 0, high = p.m;  // the last row that starts at or before e
      while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (p.offsets[middle] <= e) {
          low = middle;
        } else {
          high = middle;
        }
      }
      record.token = static_cast<int32_t>(low);
      record.value = number_at(p.values, e);
      record.gate = number_at(p.gate, e);
      record.gradient = number_at(p.d_values, e);
    }
    p.records[at] = record;
  }
}

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

// The 16-byte words of one entry: K chunks of g, then K of x, of 1 or 2 words; word w of thread t lies at w threads + t.
struct Slots {
  uint4* base;  // of this thread
  int threads;
  int w_words, g_words, x_words;  // per chunk, 0 for what is not read
  int w_dtype, g_dtype, x_dtype;  // of the chunks there
};

__host__ __device__ inline int chunk_words(const Rows& m) {
  return m.wide && m.dtype != kFloat32 ? 1 : 2;
}

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
  return s;
}

template <int K>
__device__ inline uint4* entry_slot(const Slots& s, int slot) {
  return s.base + K * (s.w_words + slot * (s.g_words + s.x_words)) * s.threads;
}

template <int K>
__device__ inline void copy_row(const Rows& m, int64_t row, uint4* to, const Slots& s, int words) {
  if (!m.wide) {
    for (int k = 0; k < K; ++k) {
      const int64_t col = (static_cast<int64_t>(k) * s.threads + threadIdx.x) * kChunk;
      if (col >= m.cols) return;
      float v[kChunk];
      load_narrow(m, row, col, v);
      to[2 * k * s.threads] = pack_fp32(v);
      to[(2 * k + 1) * s.threads] = pack_fp32(v + 4);
    }
    return;
  }
  const char* from = chunk_address(m, row, static_cast<int64_t>(threadIdx.x) * kChunk);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if ((k * s.threads + static_cast<int>(threadIdx.x)) * kChunk >= m.cols) return;
    async_copy_16(to, from, words == 2);
    if (words == 2) async_copy_16(to + s.threads, from + 16, true);
    to += words * s.threads;
    from += s.threads * words * 16;
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

template <int K>
__device__ inline bool holds(int64_t cols, int k, int threads) {
  return (k * threads + static_cast<int>(threadIdx.x)) * kChunk < cols;
}

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

// Adds value g[r] to the decoder's sums; returns this thread's part of <W_dec[j], g[r]>.
template <int K>
__device__ inline float decoder_entry(const FeaturePass& p, const Slots& s, const uint4* slot,
                                      float value, FeatureSums<K>* sums) {
  float dot = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!holds<K>(p.g.cols, k, s.threads)) break;
    float g[kChunk];
    read_chunk(slot + k * s.g_words * s.threads, s.threads, s.g_words, s.g_dtype, g);
    if (p.dots) {
      float w[kChunk];
      read_chunk(s.base + k * s.w_words * s.threads, s.threads, s.w_words, s.w_dtype, w);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) dot = fmaf(w[i], g[i], dot);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums->dec[k][i] = fmaf(value, g[i], sums->dec[k][i]);
  }
  return dot;
}

template <int K>
__device__ inline void encoder_entry(const FeaturePass& p, const Slots& s, const uint4* slot,
                                     float d_pre, FeatureSums<K>* sums) {
  slot += K * s.g_words * s.threads;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!holds<K>(p.x.cols, k, s.threads)) break;
    float x[kChunk];
    read_chunk(slot + k * s.x_words * s.threads, s.threads, s.x_words, s.x_dtype, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums->enc[k][i] = fmaf(d_pre, x[i], sums->enc[k][i]);
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
      encoder_entry<K>(p, s, entry_slot<K>(s, slot + b), d_pre, sums);
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
    if (p.d_threshold == nullptr || !(record.gate == 0.0f || record.value < theta + p.half)) continue;
    const float d_gate = p.d_gate != nullptr ? p.d_gate[p.permutation[piece.start + i]] : 0.0f;
    *window += theta * gradient + d_gate;
  }
  *bias = warp_sum(*bias);
  *window = warp_sum(*window);
}

// Sums over the entries of one piece; at least one.
template <int K>
__device__ inline void walk_piece(const FeaturePass& p, const Piece& piece, uint4* memory,
                                  FeatureShared& shared, FeatureSums<K>* sums) {
  constexpr int B = feature_batch(K);
  const Slots s = feature_slots(p, memory);
  for (int i = threadIdx.x; i < piece.count; i += blockDim.x) {
    shared.records[i] = p.records[piece.start + i];
  }
  // Warps that a CTA does not have count as zeros.
  for (int i = threadIdx.x; i < 2 * 4 * kFeatureWarps; i += blockDim.x) {
    reinterpret_cast<float*>(shared.partial)[i] = 0.0f;
  }
  if (p.dots) copy_row<K>(p.W_dec, piece.latent, s.base, s, s.w_words);
  __syncthreads();
  const int batches = (piece.count + B - 1) / B;
  for (int batch = 0; batch < p.stages; ++batch) {
    start_batch<K>(p, s, shared, batch, batch * B, piece.count);
    async_commit();
  }
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
    const uint4* at = reinterpret_cast<const uint4*>(from) + 2 * (k * blockDim.x + threadIdx.x);
    float part[kChunk];
    widen_fp32(at[0], part);
    widen_fp32(at[1], part + 4);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[k][i] += part[i];
  }
}

template <int K>
__device__ inline void add_pieces(const FeaturePass& p, const Piece& piece, FeatureSums<K>* sums) {
  const int64_t size = feature_piece_size(p);
  const float* from = p.pieces + (piece.begin / kSegment + 1) * size;
  for (int64_t at = piece.begin + kSegment; at < piece.end; at += kSegment, from += size) {
    const float* columns = from;
    if (p.encoder) {
      add_columns<K>(columns, p.x.cols, sums->enc);
      columns += padded_columns(p.x.cols);
    }
    if (p.decoder) {
      add_columns<K>(columns, p.g.cols, sums->dec);
      columns += padded_columns(p.g.cols);
    }
    sums->bias += columns[0];
    sums->window += columns[1];
  }
}

// Sums the pieces behind the first one of every latent that has any; one CTA per window.
template <int K>
__global__ void __launch_bounds__(feature_threads(K), feature_blocks(K))
    feature_pieces_kernel(FeaturePass p) {
  GSF_DYNAMIC_SHARED(uint4, memory);
  __shared__ FeatureShared shared;
  const Piece piece = window_piece(p, blockIdx.x);
  if (piece.count == 0) return;
  FeatureSums<K> sums;
  clear_sums(&sums);
  walk_piece<K>(p, piece, memory, shared, &sums);
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
//   static constexpr int blocks(int K)      CTAs per multiprocessor that its registers must leave room for
//   template <int K> __device__ void operator()(int64_t latent, int64_t entries, FeatureSums<K>& sums, uint4* memory) const
//
// Thread t holds columns (k threads + t) kChunk .. + 7 of both rows, zeros beyond the last. `memory`, the dynamic shared
// memory, is free: with both parts it has room for a row of float32 (thread t's chunks and those of others). A latent
// without entries has sums of zero.
template <int K, class Finish>
__global__ void __launch_bounds__(feature_threads(K), Finish::blocks(K))
    feature_pass_kernel(FeaturePass p, Finish finish) {
  GSF_DYNAMIC_SHARED(uint4, memory);
  __shared__ FeatureShared shared;
  const int64_t latent = p.first + blockIdx.x;
  const Piece piece = latent_piece(p, latent);
  FeatureSums<K> sums;
  clear_sums(&sums);
  if (piece.count > 0) {
    walk_piece<K>(p, piece, memory, shared, &sums);
    add_pieces<K>(p, piece, &sums);
  }
  if (threadIdx.x == 0) {
    if (p.d_b_enc != nullptr) p.d_b_enc[latent] = sums.bias;
    if (p.d_threshold != nullptr) p.d_threshold[latent] = sums.window / -p.bandwidth;
  }
  finish.template operator()<K>(latent, piece.end - piece.begin, sums, memory);
}

// Gradients in the dtype of the parameters, one row per latent; data null: not wanted.
struct StoreGradients {
  Target d_W_enc, d_W_dec;

  static constexpr int blocks(int K) { return feature_blocks(K); }

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
  __device__ void operator()(int64_t latent, int64_t, FeatureSums<K>& sums, uint4*) const {
    store<K>(d_W_dec, latent, sums.dec);
    store<K>(d_W_enc, latent, sums.enc);
  }
};

// ---- how a pass is launched

struct FeatureShape {
  int K;  // 0: the rows do not fit
  int threads, stages;
  int64_t bytes;  // of dynamic shared memory
};

// Chunks per thread: as few as reach the columns of a row. Stages: as many as leave room for the CTAs that the registers
// allow, else two, so that a batch is always on its way, else one.
inline FeatureShape feature_shape(const FeaturePass& p, int64_t shared_per_block,
                                  int64_t shared_per_processor) {
  const int64_t in = p.encoder ? p.x.cols : 0, out = p.decoder ? p.g.cols : 0;
  const int64_t chunks = padded_columns(in > out ? in : out) / kChunk;
  FeatureShape shape = {};
  if (chunks > kFeatureChunks) return shape;
  int K = 1;
  while (chunks > static_cast<int64_t>(K) * feature_threads(K)) ++K;
  const int64_t per_thread = (chunks + K - 1) / K;
  shape.threads = per_thread < kWarp ? kWarp : static_cast<int>((per_thread + kWarp - 1) / kWarp * kWarp);
  const int64_t words = (p.decoder ? chunk_words(p.g) : 0) + (p.encoder ? chunk_words(p.x) : 0);
  const int64_t chunk = static_cast<int64_t>(K) * shape.threads * 16;
  const int64_t fixed = p.dots ? chunk * chunk_words(p.W_dec) : 0;
  const int64_t batch = chunk * words * feature_batch(K);
  const int64_t own = static_cast<int64_t>(sizeof(FeatureShared)), reserved = 1024;
  const int64_t wanted = static_cast<int64_t>(feature_blocks(K)) * feature_threads(K) / shape.threads;
  for (int stages = kFeatureStages; stages > 0; --stages) {
    const int64_t bytes = fixed + stages * batch;
    if (bytes + own > shared_per_block) continue;
    if (stages > 2 && wanted * (bytes + own + reserved) > shared_per_processor) continue;
    shape.K = K;
    shape.stages = stages;
    shape.bytes = bytes;
    return shape;
  }
  return shape;
}

}  // namespace gemmascope_fast
