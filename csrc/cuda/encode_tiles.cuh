// What a kernel that multiplies x by W_enc leaves behind instead of the product: the entries that pass a limit.
//
// A *strip* is 16 tokens x kWidth latents, held by one warp in the accumulator layout of m16n8 matrix instructions. For
// each strip with hits the warp reserves one contiguous run of records in an arena, by one atomic, and writes the hits in
// the order (token, latent). Where a run lies depends on timing; what it holds does not: place_kernel.cuh moves every
// record to its place in canonical CSR, found from the counts alone. A run that does not fit is counted and not
// written; a second pass over the strips that miss theirs writes them into an arena of the exact size.
#pragma once

#include <stdint.h>

namespace gemmascope_fast {

constexpr int kStripTokens = 16;
constexpr int64_t kMaxRun = 16 * 256;  // most records of one strip

// A record: value in the low half; latent, and kOff for an entry that lies only in the window, in the high half.
constexpr uint32_t kOff = 0x80000000u;

enum class Limit : int {
  kPerLatent,  // JumpReLU: pre > threshold[j], or > threshold[j] - window: stored with value 0 and kOff
  kPerToken,   // TopK, BatchTopK: pre > bound[i], or pre is NaN (a hit whose value is NaN)
};

struct EncodeTiles {
  // x [n, d] and W [d_sae, d], rows contiguous in their elements; strides in elements between rows.
  const void* x;
  const void* W;
  int64_t n, d, d_sae;
  int64_t x_stride, W_stride;
  int64_t first, last;  // latents [first, last) are computed; `first` is a multiple of 256
  const float* bias;    // [d_sae]

  // kPerLatent. limit[j] is at most threshold[j] - window - bias[j] minus the rounding of acc + bias, and NaN where any of
  // them is: whatever is not `acc <= limit[j]` is decided exactly, by pre = acc + bias[j] rounded once.
  const float* limit;      // [d_sae]
  const float* threshold;  // [d_sae]
  float window;            // bandwidth / 2, or 0: no window entries

  // kPerToken. A token's bound is never negative.
  const float* bound;  // [n]

  // Outputs. Column block c of the run covers latents first + c * width .. of `width` latents each, strip s covers tokens
  // 16 s .. 16 s + 15, strips = ceil(n / 16).
  uint16_t* counts;           // [column blocks][strips * 16] hits of each token, 0 beyond n
  uint64_t* runs;             // [column blocks][strips] position of the strip's first record (anything where it has none)
  uint64_t* records;          // [arena]
  uint64_t arena;             // records that fit
  unsigned long long* needed; // records reserved by all strips, those that did not fit included; starts at 0
  int32_t* invalid;           // [n] smallest latent whose pre or threshold is NaN (kPerLatent); starts at d_sae

  // Second pass: only strips with run + count > arena are computed, nothing is reserved or counted, and the records go to
  // rest[run - rest_begin ...], rest_begin = max(arena - kMaxRun, 0). Null in the first pass.
  uint64_t* rest;
  uint64_t rest_begin;
};

}  // namespace gemmascope_fast
