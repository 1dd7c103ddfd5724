// Adam on four adjacent columns of a row, by one thread: loads, update, rounding, stores; and the sums over a row.
//
// Every lane of a warp must come along, also those beyond the row: the warp's 128 columns share an exponent of the
// 8-bit second moments, and a sum.
#pragma once

#include "cuda/adam_element.cuh"
#include "cuda/moment_codes.cuh"
#include "cuda/quads.cuh"
#include "cuda/random_words.cuh"

namespace gemmascope_fast {

// One matrix [rows, cols], its state, and the numbers of this step. Rows are contiguous; strides in elements.
struct AdamView {
  void* weight;         // float32 or bfloat16, see weight_dtype
  float* exp_avg;       // null when beta1 = 0
  float* exp_avg_sq;    // null with 8-bit codes
  uint8_t* codes;       // null without
  uint8_t* exponents;   // [rows, cols / 128 rounded up]
  int64_t* touched_at;  // [rows]
  int64_t rows, cols;
  int64_t weight_stride, exp_avg_stride, exp_avg_sq_stride;
  double beta1, beta2;
  AdamRates rates;
  int64_t step, tail;  // tail <= step
  uint64_t seed;
  int weight_dtype;
  bool remove_parallel, unit_norm;
};

__device__ inline const void* weight_row(const AdamView& a, int64_t row) {
  return static_cast<const char*>(a.weight) +
         row * a.weight_stride * (a.weight_dtype == kFloat32 ? 4 : 2);
}

// Blocks of 128 columns of a row.
__device__ inline int64_t column_blocks(const AdamView& a) {
  return (a.cols + kMomentColumns - 1) / kMomentColumns;
}

// ---- sums

// Sum over the lanes of a warp, neighbours first; every lane gets it.
__device__ inline float pair_sum(float value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    value = rounded_add(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// <a, b> over the 128 columns of a warp.
__device__ inline float block_sum(const float (&a)[4], const float (&b)[4]) {
  const float low = rounded_add(rounded_mul(a[0], b[0]), rounded_mul(a[1], b[1]));
  const float high = rounded_add(rounded_mul(a[2], b[2]), rounded_mul(a[3], b[3]));
  return pair_sum(rounded_add(low, high));
}

// Keeps the sum of a block of 128 columns, which all lanes hold.
__device__ inline void keep_block(float* sums, int64_t column, float sum) {
  if (column % kMomentColumns == 0) sums[column / kMomentColumns] = sum;
}

// Sum over the blocks of a row; every lane of the calling warp gets it.
__device__ inline float row_sum(const float* sums, int64_t blocks) {
  float total = 0.0f;
  for (int64_t k = threadIdx.x % 32; k < blocks; k += 32) total = rounded_add(total, sums[k]);
  return pair_sum(total);
}

// How much of w is in g: <g, w> / <w, w>, 0 for w = 0.
__device__ inline float parallel_share(float gw, float ww) {
  return ww == 0.0f ? 0.0f : rounded_div(gw, ww);
}

__device__ inline bool quad_nonzero(const float (&g)[4]) {
  return g[0] != 0.0f || g[1] != 0.0f || g[2] != 0.0f || g[3] != 0.0f;
}

// ---- state

__device__ inline RandomRow random_row(const AdamView& a, int64_t row) {
  return {a.seed, static_cast<uint64_t>(row), static_cast<uint64_t>(a.step)};
}

__device__ inline void load_moments(const AdamView& a, int64_t row, int64_t column, float (&v)[4]) {
  if (a.codes == nullptr) {
    load_floats(a.exp_avg_sq + row * a.exp_avg_sq_stride, column, a.cols, v);
    return;
  }
  uint8_t codes[4];
  load_bytes(a.codes + row * a.exp_avg_sq_stride, column, a.cols, codes);
  uint8_t exponent = 0;
  if (column < a.cols) {
    exponent = a.exponents[row * column_blocks(a) + column / kMomentColumns];
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = decode_moment(codes[e], exponent);
}

__device__ inline void store_codes(const AdamView& a, int64_t row, int64_t column,
                                   const float (&v)[4]) {
  uint32_t bits[4], largest = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    bits[e] = column + e < a.cols ? moment_bits(v[e]) : 0;
    largest = bits[e] > largest ? bits[e] : largest;
  }
  const int exponent = moment_exponent(__reduce_max_sync(0xffffffffu, largest));
  const RandomQuad random = random_quad(random_row(a, row), static_cast<uint32_t>(column / 4));
  uint8_t codes[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) codes[e] = encode_moment(bits[e], exponent, random.word[e]);
  store_bytes(a.codes + row * a.exp_avg_sq_stride, column, a.cols, codes);
  if (column % kMomentColumns == 0 && column < a.cols) {
    a.exponents[row * column_blocks(a) + column / kMomentColumns] = static_cast<uint8_t>(exponent);
  }
}

// What is read of a quad.
struct AdamQuad {
  float w[4], v[4], m[4];
};

__device__ inline void load_state(const AdamView& a, int64_t row, int64_t column, AdamQuad* quad) {
  load_quad(weight_row(a, row), a.weight_dtype, column, a.cols, quad->w);
  load_moments(a, row, column, quad->v);
  if (a.exp_avg != nullptr) {
    load_floats(a.exp_avg + row * a.exp_avg_stride, column, a.cols, quad->m);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) quad->m[e] = 0.0f;
  }
}

// ---- update

// g becomes the new w, 0 beyond the row; kStore: the moments are written.
template <bool kStore>
__device__ inline void adam_quad(const AdamView& a, int64_t row, int64_t column,
                                 const AdamDecays& decays, AdamQuad* quad, float (&g)[4]) {
  const bool momentum = a.exp_avg != nullptr;
  adam_elements(a.rates, decays, momentum, g, quad->m, quad->v, quad->w);
#pragma unroll
  for (int e = 0; e < 4; ++e) g[e] = column + e < a.cols ? quad->w[e] : 0.0f;  // eps may be 0
  if (!kStore) return;
  if (momentum) store_floats(a.exp_avg + row * a.exp_avg_stride, column, a.cols, quad->m);
  if (a.codes != nullptr) {
    store_codes(a, row, column, quad->v);
  } else {
    store_floats(a.exp_avg_sq + row * a.exp_avg_sq_stride, column, a.cols, quad->v);
  }
}

__device__ inline void store_weight(const AdamView& a, int64_t row, int64_t column,
                                    const float (&w)[4]) {
  void* out = const_cast<void*>(weight_row(a, row));
  if (a.weight_dtype == kFloat32) {
    store_floats(static_cast<float*>(out), column, a.cols, w);
    return;
  }
  const RandomQuad random = random_quad(random_row(a, row), static_cast<uint32_t>(column / 4));
  uint16_t bits[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) bits[e] = round_stochastically(w[e], random.word[e]);
  store_halves(static_cast<uint16_t*>(out), column, a.cols, bits);
}

// square = |w|^2 of the new row, w a quad of it.
__device__ inline void store_normalised(const AdamView& a, int64_t row, int64_t column,
                                        float square, float (&w)[4]) {
  const float norm = rounded_sqrt(square);
#pragma unroll
  for (int e = 0; e < 4; ++e) w[e] = square == 0.0f ? w[e] : rounded_div(w[e], norm);
  store_weight(a, row, column, w);
}

}  // namespace gemmascope_fast
