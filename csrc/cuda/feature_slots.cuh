// Where a thread of the feature-major pass keeps its chunks of the next entries' rows, and how they get there.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/feature_pass.cuh"

namespace gemmascope_fast {

// The 16-byte words of one entry: K chunks of g, then K of x, of 1 or 2 words; word w of thread t lies at w threads +
// t.
struct Slots {
  uint4* base;  // of this thread
  int threads;
  int w_words, g_words, x_words;    // per chunk, 0 for what is not read
  int w_dtype, g_dtype, x_dtype;    // of the chunks there
  bool fast_decoder, fast_encoder;  // all of it bfloat16, with dot products
  bool last;                        // with even slots: this thread holds K chunks, not K - 1
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
  s.last = true;
  return s;
}

// Whether all three rows are bfloat16, wide, equally long, and reach every thread's chunk K - 1 or end in it: nothing
// is asked about an entry then.
template <int K>
__device__ inline bool even_rows(const FeaturePass& p) {
  const auto same = [&](const Rows& m) {
    return m.wide && m.dtype == kBFloat16 && m.cols == p.g.cols;
  };
  return p.dots && p.encoder && same(p.W_dec) && same(p.g) && same(p.x) &&
         (K - 1) * static_cast<int>(blockDim.x) * kChunk <= p.g.cols;
}

template <int K>
__device__ inline Slots even_slots(const FeaturePass& p, uint4* shared) {
  const int threads = blockDim.x, chunk = (K - 1) * threads + static_cast<int>(threadIdx.x);
  return {shared + threadIdx.x,     threads, 1, 1, 1, kBFloat16, kBFloat16, kBFloat16, true, true,
          chunk * kChunk < p.g.cols};
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

// The same of even rows.
template <int K>
__device__ inline void copy_even_row(const Rows& m, int64_t row, uint4* to, const Slots& s) {
  const char* from =
      static_cast<const char*>(m.data) + threadIdx.x * 16 +
      static_cast<uint64_t>(static_cast<uint32_t>(row)) * (static_cast<uint32_t>(m.row_stride) * 2);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k < K - 1 || s.last) async_copy_16(to + k * s.threads, from + k * s.threads * 16, false);
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

}  // namespace gemmascope_fast
