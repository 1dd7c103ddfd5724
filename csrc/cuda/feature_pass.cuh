// What the kernels of the feature-major pass (feature_pass_kernel.cuh) are handed, and how a row is cut and launched.
#pragma once

#include "cuda/hot_latents.cuh"

namespace gemmascope_fast {

constexpr int kSegment = 256;         // entries of a piece
constexpr int kFeatureWarps = 8;      // at most
constexpr int kFeatureStages = 4;     // at most
constexpr int kFinishShared = 2048;   // static shared memory that may finish a row, bytes
constexpr int kFeatureChunks = 1024;  // of a row that fits: 8192 columns

// Chunks of columns per thread, K, and what follows from it.
// 3 x 224 chunks are 5376 columns.
__host__ __device__ constexpr int feature_threads(int K) { return K == 3 ? 224 : 256; }
__host__ __device__ constexpr int feature_batch(int K) { return K == 1 ? 4 : K == 2 ? 2 : 1; }

// CTAs of a multiprocessor that the compiler keeps registers for. From 10.0 on its code takes more of them than three
// leave; 12.0 has no shared memory for three.
__host__ __device__ constexpr int feature_blocks(int K, int capability) {
  return capability >= 100 || K > 2 ? 2 : K == 1 ? 4 : 3;
}

// What the pass reads of an entry besides rows; entries are sorted by latent. No entry: token -1.
struct __align__(16) Record {
  int32_t token;
  float value, gate, gradient;
};

struct FeaturePass {
  const int64_t* feature_offsets;  // [d_sae + 1]
  const int64_t* permutation;      // [capacity]
  const int32_t* indices;  // [capacity], in the order of the entries, as d_gate, d_values and d_pre
  Record* records;         // [capacity], in the order of the latents
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

  const int32_t* hot_slots;  // with hot: latents that are left out (hot_latents.cuh); null: none
  const HotState* hot;

  float* pieces;  // [windows][feature_piece_size]
  int stages;     // batches of entries in shared memory
};

// Window w of the sorted entries covers positions [w kSegment, (w + 1) kSegment). At most one later piece starts in it,
// and its latent owns position w kSegment: pieces are found by window, without a list.
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

// What a CTA shares.
struct FeatureShared {
  Record records[kSegment];
  float gradients[kSegment];
  float4 partial[2][4][kFeatureWarps / 4];  // [batch % 2][entry of the batch][warp]
};

// ---- how a pass is launched

struct FeatureShape {
  int K;  // 0: the rows do not fit
  int threads, stages;
  int64_t bytes;  // of dynamic shared memory
};

// Chunks per thread: as few as reach the columns of a row. Stages: as many as leave room for the CTAs that the
// registers allow (`blocks`, those of the pass's Finish), else two, so that a batch is always on its way, else one.
inline FeatureShape feature_shape(const FeaturePass& p, int64_t shared_per_block,
                                  int64_t shared_per_processor,
                                  int (*blocks)(int K, int capability) = &feature_blocks,
                                  int capability = 80) {
  const int64_t in = p.encoder ? p.x.cols : 0, out = p.decoder ? p.g.cols : 0;
  const int64_t chunks = padded_columns(in > out ? in : out) / kChunk;
  FeatureShape shape = {};
  if (chunks > kFeatureChunks) return shape;
  int K = 1;
  while (chunks > static_cast<int64_t>(K) * feature_threads(K)) ++K;
  const int64_t per_thread = (chunks + K - 1) / K;
  shape.threads =
      per_thread < kWarp ? kWarp : static_cast<int>((per_thread + kWarp - 1) / kWarp * kWarp);
  const int64_t words = (p.decoder ? chunk_words(p.g) : 0) + (p.encoder ? chunk_words(p.x) : 0);
  const int64_t chunk = static_cast<int64_t>(K) * shape.threads * 16;
  const int64_t fixed = p.dots ? chunk * chunk_words(p.W_dec) : 0;
  const int64_t batch = chunk * words * feature_batch(K);
  const int64_t own = static_cast<int64_t>(sizeof(FeatureShared)) + kFinishShared, reserved = 1024;
  const int64_t both = p.decoder && p.encoder ? 4 * chunk : 0;  // rows of float32
  const int64_t wanted =
      static_cast<int64_t>(blocks(K, capability)) * feature_threads(K) / shape.threads;
  for (int stages = kFeatureStages; stages > 0; --stages) {
    const int64_t rows = fixed + stages * batch, bytes = rows > both ? rows : both;
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
