// Adam on quads of columns of a row whose weights are bfloat16 and whose only moments are 8-bit codes, in whole
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

// What is read of kQuads quads of a thread.
template <int kQuads>
struct NarrowQuads {
  uint2 weight[kQuads];
  uint32_t codes[kQuads], exponent[kQuads];
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

// Quads `stride` columns apart.
template <int kQuads>
__device__ inline NarrowQuads<kQuads> load_narrow(const NarrowRow& r, uint32_t column,
                                                  uint32_t stride) {
  NarrowQuads<kQuads> quads;
#pragma unroll
  for (int q = 0; q < kQuads; ++q, column += stride) {
    quads.weight[q] = r.weight[column / 4];
    quads.codes[q] = r.codes[column / 4];
    quads.exponent[q] = r.exponents[column / kMomentColumns];
  }
  return quads;
}

__device__ inline void widen_narrow(uint2 weight, float* w) {
  w[0] = float_of(weight.x << 16);
  w[1] = float_of(weight.x & 0xffff0000u);
  w[2] = float_of(weight.y << 16);
  w[3] = float_of(weight.y & 0xffff0000u);
}

__device__ inline void store_narrow_codes(const NarrowRow& r, uint32_t column, bool positive,
                                          const float* v, const uint32_t* random) {
  uint32_t bits[4], words[4], largest = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    bits[e] = bits_of(v[e]);
    words[e] = random[e];
    largest = larger(largest, bits[e]);
  }
  largest &= 0x7fffffffu;  // only a NaN has the sign, and any NaN decides
  const int exponent = moment_exponent(__reduce_max_sync(0xffffffffu, largest));
  uint32_t codes = encode_positive_moments(bits, exponent, words);
  if (!positive) {
#pragma unroll
    for (int e = 0; e < 4; ++e) bits[e] = moment_bits(v[e]);
    codes = encode_moments(bits, exponent, words);
  }
  r.codes[column / 4] = codes;
  if (column % kMomentColumns == 0) {
    r.exponents[column / kMomentColumns] = static_cast<uint8_t>(exponent);
  }
}

// g, from which the row's share is taken, becomes the new w; the codes are written, and the weights without `keep`.
// Nothing is asked between the quads, so that they are computed side by side.
template <int kQuads>
__device__ inline void move_narrow(const AdamView& a, const NarrowRow& r, const RandomRow& random,
                                   uint32_t column, uint32_t stride, float decay,
                                   const NarrowQuads<kQuads>& quads, bool keep,
                                   float (&g)[4 * kQuads]) {
  float m[4 * kQuads], v[4 * kQuads], w[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float moments[4];
    decode_moments(quads.codes[q], quads.exponent[q], moments);
    widen_narrow(quads.weight[q], w + 4 * q);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[4 * q + e] = moments[e];
  }
  const bool positive = adam_elements(a.rates, {0.0f, decay, 0.0f}, false, g, m, v, w);
  uint32_t words[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const RandomQuad four = random_quad(a.keys, random, (column + q * stride) / 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) words[4 * q + e] = four.word[e];
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    store_narrow_codes(r, column + q * stride, positive, v + 4 * q, words + 4 * q);
  }
#pragma unroll
  for (int e = 0; e < 4 * kQuads; ++e) g[e] = w[e];
  if (keep) return;
  uint32_t out[2 * kQuads];
  round_stochastically(w, words, out);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    r.weight[(column + q * stride) / 4] = make_uint2(out[2 * q], out[2 * q + 1]);
  }
}

}  // namespace gemmascope_fast
