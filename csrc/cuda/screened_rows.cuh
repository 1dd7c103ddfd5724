// int8 codes of the screened encoder: their layout, and what quantise_kernel.cuh is told.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

// Columns of codes: d in whole blocks of at least 128.
__host__ __device__ inline int64_t screened_width(int64_t d) { return (d + 127) / 128 * 128; }
__host__ __device__ inline int64_t screened_block(int64_t width) {
  return width % 256 == 0 ? 256 : 128;
}

// Columns [col, col + 8) of a row as float32, zeros beyond the last; col is a multiple of 8.
__device__ inline void load_floats(const Rows& m, int64_t row, int64_t col, float (&out)[kChunk]) {
  if (!m.wide) {
    load_narrow(m, row, col, out);
    return;
  }
  const char* from = chunk_address(m, row, col);
  const uint4 first = load_if(col < m.cols, from);
  const uint4 second = load_if(col < m.cols && m.dtype == kFloat32, from + 16);
  widen_chunk(first, second, m.dtype, out);
}

// What is known of a latent.
struct LatentCodes {
  float scale;  // v B; NaN: every entry is a candidate
  float dot;    // c . w
};

struct QuantiseRows {
  Rows rows;
  const float* center;  // [width], zeros behind d
  int64_t width;
  int64_t count;              // of rows
  const int64_t* touched_at;  // [rows] Adam's: the rows that its step moved; null: all
  int8_t* codes;              // [rows][width]

  // tokens
  float* scale;  // [rows] u
  float* bound;  // [rows] kScreenZero - margin; NaN: every entry is a candidate

  // latents
  LatentCodes* latents;  // [rows]
  int32_t* unscreened;   // how many have NaN for a scale

  int64_t step, tail;  // of the optimizer, with touched_at
};

}  // namespace on_cuda
}  // namespace gemmascope_fast
