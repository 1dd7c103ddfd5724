// Adam on four adjacent columns of a row whose weights are bfloat16 and whose only moments are 8-bit codes, in whole
// blocks of 128 columns: adam_quad.cuh with nothing left to ask. 6 bytes of memory per element.
#pragma once

#include "cuda/adam_quad.cuh"

namespace gemmascope_fast {

// One row of such a matrix.
struct NarrowRow {
  uint2* weight;
  uint32_t* codes;
  uint8_t* exponents;
  uint32_t cols;
};

// What is read of a quad.
struct NarrowQuad {
  uint2 weight;
  uint32_t codes, exponent;
};

__device__ inline bool is_narrow(const AdamView& a) {
  return a.weight_dtype == kBFloat16 && a.codes != nullptr && a.exp_avg == nullptr &&
         a.cols % kMomentColumns == 0 && (a.weight_stride | a.exp_avg_sq_stride) % 4 == 0 &&
         reinterpret_cast<uintptr_t>(a.weight) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(a.codes) % 4 == 0;
}

__device__ inline NarrowRow narrow_row(const AdamView& a, int64_t row) {
  return {reinterpret_cast<uint2*>(static_cast<uint16_t*>(a.weight) + row * a.weight_stride),
          reinterpret_cast<uint32_t*>(a.codes + row * a.exp_avg_sq_stride),
          a.exponents + row * column_blocks(a), static_cast<uint32_t>(a.cols)};
}

__device__ inline NarrowQuad load_narrow(const NarrowRow& r, uint32_t column) {
  return {r.weight[column / 4], r.codes[column / 4], r.exponents[column / kMomentColumns]};
}

__device__ inline void widen_narrow(uint2 weight, float (&w)[4]) {
  w[0] = float_of(weight.x << 16);
  w[1] = float_of(weight.x & 0xffff0000u);
  w[2] = float_of(weight.y << 16);
  w[3] = float_of(weight.y & 0xffff0000u);
}

__device__ inline void store_narrow_codes(const NarrowRow& r, uint32_t column, bool positive,
                                          const float (&v)[4], const RandomQuad& random) {
  uint32_t bits[4], largest = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    bits[e] = bits_of(v[e]);
    largest = larger(largest, bits[e]);
  }
  largest &= 0x7fffffffu;  // only a NaN has the sign, and any NaN decides
  const int exponent = moment_exponent(__reduce_max_sync(0xffffffffu, largest));
  uint32_t codes = encode_positive_moments(bits, exponent, random.word);
  if (__builtin_expect(!positive, 0)) {
#pragma unroll
    for (int e = 0; e < 4; ++e) bits[e] = moment_bits(v[e]);
    codes = encode_moments(bits, exponent, random.word);
  }
  r.codes[column / 4] = codes;
  if (column % kMomentColumns == 0) {
    r.exponents[column / kMomentColumns] = static_cast<uint8_t>(exponent);
  }
}

// g, from which the row's share is taken, becomes the new w; the codes are written, and the weights without `keep`.
__device__ inline void narrow_quad(const AdamView& a, const NarrowRow& r, const RandomRow& random,
                                   uint32_t column, float decay, const NarrowQuad& quad, bool keep,
                                   float (&g)[4]) {
  const RandomQuad words = random_quad(random, column / 4);
  float m[4], v[4], w[4];
  widen_narrow(quad.weight, w);
  decode_moments(quad.codes, quad.exponent, v);
  const bool positive = adam_elements(a.rates, {0.0f, decay, 0.0f}, false, g, m, v, w);
  store_narrow_codes(r, column, positive, v, words);
  if (!keep) {
    uint32_t out[2];
    round_stochastically(w, words.word, out);
    r.weight[column / 4] = make_uint2(out[0], out[1]);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) g[e] = w[e];
}

}  // namespace gemmascope_fast
