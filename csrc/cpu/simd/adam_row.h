// Adam on one row of c floats, its 8-bit second moments, and its random bits.
//
//   update   g' = g - parallel w;  m = m decay1 + one_minus1 g';  v = v decay2 + (one_minus2 g') g'
//            w = w - (step_size m) / (sqrt(v) scale + eps)
//
// Every operation is rounded on its own, in this order (no fma), as element-wise PyTorch does: the reference has the same
// bits. Only the dot products of `dots` are sums: canonical ones, 16 lanes with fma.
#pragma once

#include <stdint.h>

#include "cpu/simd/row.h"

namespace gemmascope_fast {

constexpr int64_t kMomentBlock = 128;  // columns that share one exponent of the 8-bit second moment
constexpr int64_t kRandomBlock = 64;   // columns whose random words are made together

struct AdamScalars {
  float step_size, decay1, one_minus1, decay2, one_minus2, scale, eps, parallel;
};

struct AdamRowTable {
  bool (*any_nonzero)(const float* g, int64_t c);
  // out[0] = <g, w>, out[1] = <w, w>
  void (*dots)(const float* g, const float* w, int64_t c, float* out);
  // g null: a row without gradient, zeros. m null: no first moment. ahead: what the next call will read.
  void (*update)(const AdamScalars& s, const float* g, float* m, float* v, float* w, int64_t c,
                 RowAhead ahead);
  void (*divide)(float divisor, float* w, int64_t c);
  void (*decode)(const uint8_t* codes, const uint8_t* exponents, int64_t c, float* v);
  void (*encode)(const float* v, const uint32_t* random, int64_t c, uint8_t* codes,
                 uint8_t* exponents);
  void (*round_bf16)(const float* w, const uint32_t* random, int64_t c, uint16_t* out);
  // Philox 4x32-7 words of columns [0, c); out has room for c rounded up to kRandomBlock.
  void (*random)(uint64_t seed, uint64_t row, uint64_t step, int64_t c, uint32_t* out);
};

const AdamRowTable& adam_row_table(SimdTarget target);

}  // namespace gemmascope_fast
