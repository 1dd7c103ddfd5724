// Host side of the encoders: from x, W_enc, b_enc and a limit to the entries that pass it, as CSR.
//
//   encode_inputs   x and W_enc as the kernels read them; a copy only where dtypes or layouts ask for one
//   encode_hits     the product with its limit, and the exact offsets of the result; nothing waits for the device
//   encode_missing  again what the first arena had no room for
//   place_hits      the entries in canonical order
//
// jumprelu_encode calls them one by one, TopK and BatchTopK call encode_candidates for each prefix of the latents.
#pragma once

#include <cuda_runtime_api.h>

#include "common/matrix.h"
#include "cuda/encode_tiles.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// dtype, dimensions and device of an encoder's arguments.
void check_encode(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc);

// Rows are contiguous, begin at multiples of 16 bytes, and have a multiple of 16 bytes, zeros behind d.
struct EncodeInputs {
  Tensor x;     // [n, d]
  Tensor W;     // [d_sae, d]
  Tensor bias;  // [d_sae] float32
  Dtype dtype;  // of x and W; float32 where they differed
  int64_t n() const { return x.size(0); }
  int64_t d_sae() const { return W.size(0); }
  EncodeInputs of_rows(int64_t begin, int64_t rows) const;
};
Tensor tokens_of(const Tensor& t, int64_t begin, int64_t rows);
EncodeInputs encode_inputs(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc);

// What to keep of latents [first, last). `first` is a multiple of 256.
struct EncodeLimit {
  Limit kind;
  // kPerLatent: threshold [d_sae]; kPerToken: bound [n], never negative; kScreened, kUpperBound: bound [n].
  // float32, contiguous.
  Tensor values;
  Tensor scale, latent;  // kScreened, kUpperBound: scale [n] and limit [d_sae]
  Tensor least;          // kUpperBound: [n]
  float window = 0.0f;   // kPerLatent: bandwidth / 2
  int64_t first, last;
};

// What the strips left, with the memory that `tiles` points into. The tensors follow the stream they were made on.
struct EncodeHits {
  EncodeTiles tiles;
  EncodeInputs inputs;
  Limit kind;
  int width;      // latents of a column block
  Tensor values;  // of the EncodeLimit
  Tensor limit, scale, least, counts, bases, runs, records, rest;
  Tensor state;    // int64: records of all strips; then tiles.invalid
  Tensor offsets;  // [n + 1] int64: of the CSR with all entries

  const void* reserved() const { return state.data_ptr(); }
};
EncodeHits encode_hits(const char* op, const EncodeInputs& in, const EncodeLimit& limit,
                       int64_t arena, cudaStream_t stream);

// `reserved` is the value at hits.reserved(), larger than the arena.
void encode_missing(const char* op, EncodeHits& hits, int64_t reserved, cudaStream_t stream);

// Entries of fixed capacity; behind offsets[n] zeros, for kPerToken anything. More than fit: offsets are clamped to the
// capacity, indices are 0, values NaN, gates 1.
struct EncodeCsr {
  Tensor offsets;  // [n + 1] int64
  Tensor indices;  // [capacity] int32
  Tensor values;   // [capacity] float32
  Tensor gate;     // [capacity] float32; kPerToken: of size 0
  Tensor needed;   // int64 scalar: the true number of entries
};

// The steps of it: counts [n + 1] (the last one 0) to exclusive sums, in place; arrays for what these are the offsets
// of, offsets clamped and `needed` set; at last, what lies behind the entries.
void sum_counts(const char* op, const Tensor& counts, cudaStream_t stream);
EncodeCsr new_csr(const char* op, const Tensor& offsets, int64_t capacity, bool gated,
                  cudaStream_t stream);
void pad_csr(const char* op, const EncodeCsr& csr, cudaStream_t stream);

// exact: the capacity is the number of entries, or the host will look at `needed`; entries that do not fit are left out.
EncodeCsr place_hits(const char* op, EncodeHits& hits, int64_t capacity, bool exact,
                     cudaStream_t stream);

// (i, j), first <= j < last, with pre[i, j] > bound[i] or NaN. Nothing waits: compare `needed` with the capacity.
EncodeCsr encode_candidates(const char* op, const EncodeInputs& in, const Tensor& bound,
                            int64_t first, int64_t last, int64_t capacity, cudaStream_t stream);

// The same of any limit but kPerLatent.
EncodeCsr encode_candidates(const char* op, const EncodeInputs& in, const EncodeLimit& limit,
                            int64_t capacity, cudaStream_t stream);

// EncodeTiles::limit of JumpReLU.
Tensor latent_limits(const char* op, const Tensor& bias, const Tensor& threshold, float window,
                     cudaStream_t stream);

// The operands of latents [first, last), without a limit or outputs.
EncodeTiles tiles_of(const EncodeInputs& in, int64_t first, int64_t last);

// The choice of a kernel: whether it is that of few tokens, latents per strip, and the launch.
bool uses_few(const EncodeTiles& p, Dtype dtype, Limit limit);
int encode_width(const EncodeTiles& p, Dtype dtype, Limit limit);
void encode_tiles(const char* op, const EncodeTiles& p, Dtype dtype, Limit limit,
                  cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
