// What a kernel that multiplies x by W_enc leaves behind instead of the product: the entries that pass a limit.
//
// A *strip* is 16 tokens x kWidth latents, held by one warp in the accumulator layout of m16n8 matrix instructions. For
// each strip with hits the warp reserves one contiguous run of records in an arena, by one atomic, and writes the hits
// in the order (token, latent). Where a run lies depends on timing; what it holds does not: place_kernel.cuh moves
// every record to its place in canonical CSR, found from the counts alone. A run that does not fit is counted and not
// written; a second pass over the strips that miss theirs writes them into an arena of the exact size.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {  // csrc/cpu has an EncodeTiles of its own

constexpr int kStripTokens = 16;
constexpr int64_t kMaxRun = 16 * 256;  // most records of one strip

// A record: pre-activation (float32) in the low half; column in the strip (8 bits), token in the strip (4 bits) and
// rank among the token's hits in the strip (8 bits) from bit 32 on. That an entry lies only in the window is found by
// place_kernel.cuh, which compares with the threshold again.
constexpr int kRecordToken = 32 + 8;
constexpr int kRecordRank = kRecordToken + 4;

// A run: position of its first record in the low 48 bits, number of records (0 .. 4096) above.
constexpr int kRunCount = 48;
constexpr uint64_t kRunBegin = (static_cast<uint64_t>(1) << kRunCount) - 1;

enum class Limit : int {
  kPerLatent,  // JumpReLU: pre > threshold[j] - window
  kPerToken,   // TopK, BatchTopK: pre > bound[i], or pre is NaN (a hit whose value is NaN)
  kScreened,  // int8: !(acc <= scale[i] * limit[j] + bound[i]), a candidate; its value means nothing
  kUpperBound,  // int8: what pre can be at most, where that exceeds least[i] or is NaN
};
__host__ __device__ constexpr bool multiplies_codes(Limit limit) {
  return limit == Limit::kScreened || limit == Limit::kUpperBound;
}

// Sums of codes begin at 1.5 * 2^23 as a float's bits, and so are floats when they are done: 12582912 + sum where
// |sum| <= 2^22, and more than that elsewhere.
constexpr int32_t kSumZero = 0x4B400000;

struct EncodeTiles {
  // x [n, d] and W [d_sae, d], rows contiguous in their elements; strides in elements between rows.
  const void* x;
  const void* W;
  int64_t n, d, d_sae;
  int64_t x_stride, W_stride;
  int64_t first,
      last;  // latents [first, last) are computed, last <= d_sae; `first` is a multiple of 256
  const float* bias;  // [d_sae]

  // kPerLatent. limit[j] is the largest float whose sum with bias[j], rounded once, is <= threshold[j] - window:
  // exactly `acc > limit[j]` is stored. It is NaN where the threshold is NaN or the bias is not finite.
  const float* limit;      // [d_sae]; null for kernels that find it themselves
  const float* threshold;  // [d_sae]
  float window;            // bandwidth / 2, or 0: no window entries

  // kPerToken: never negative. kScreened: see quantise_kernel.cuh; x and W are int8, d is their width, and bias,
  // threshold and window are not read. kUpperBound: the same, with the latents' codes per unit for the bias. An entry is
  // !(acc <= scale[i] * (least[i] * bias[j] + limit[j]) + bound[i]); tokens whose bound is NaN have none.
  const float* bound;  // [n]
  const float* scale;  // [n] kScreened, kUpperBound
  const float* least;  // [n] kUpperBound, never negative

  // Outputs. Column block c of the run covers latents first + c * width .. of `width` latents each, strip s covers
  // tokens 16 s .. 16 s + 15, strips = ceil(n / 16).
  uint16_t* counts;   // [column blocks][strips * 16] hits of each token, 0 beyond n
  uint64_t* runs;     // [column blocks][strips] run of the strip, 0 where it has no hits
  uint64_t* records;  // [arena]
  uint64_t arena;     // records that fit
  unsigned long long*
      needed;  // records reserved by all strips, those that did not fit included; starts at 0
  // kPerLatent: [n] d_sae less the smallest latent whose pre or threshold is NaN, 0 for none; starts at 0
  int32_t* invalid;

  // Second pass: only strips with run + count > arena are computed, nothing is reserved or counted, and the records go
  // to rest[run - rest_begin ...], rest_begin = max(arena - kMaxRun, 0). Null in the first pass.
  uint64_t* rest;
  uint64_t rest_begin;
};

// The first invalid latent of a token, d_sae for none.
__device__ __forceinline__ int64_t first_invalid(const EncodeTiles& p, int64_t token) {
  return p.d_sae - p.invalid[token];
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
