// Four adjacent elements of a row, by one thread: one access where the row is aligned and long enough, else one per
// element, those beyond the row left out. A warp covers 128 columns, the block of the 8-bit second moments.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {

template <int kBytes>
__device__ inline bool whole_quad(const void* quad, int64_t column, int64_t cols) {
  return column + 4 <= cols && reinterpret_cast<uintptr_t>(quad) % kBytes == 0;
}

__device__ inline void load_floats(const float* row, int64_t column, int64_t cols,
                                   float (&out)[4]) {
  const float* from = row + column;
  if (whole_quad<16>(from, column, cols)) {
    const float4 quad = *reinterpret_cast<const float4*>(from);
    out[0] = quad.x;
    out[1] = quad.y;
    out[2] = quad.z;
    out[3] = quad.w;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = column + e < cols ? from[e] : 0.0f;
}

__device__ inline void store_floats(float* row, int64_t column, int64_t cols,
                                    const float (&in)[4]) {
  float* to = row + column;
  if (whole_quad<16>(to, column, cols)) {
    *reinterpret_cast<float4*>(to) = make_float4(in[0], in[1], in[2], in[3]);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < cols) to[e] = in[e];
  }
}

__device__ inline void load_halves(const uint16_t* row, int64_t column, int64_t cols,
                                   uint16_t (&out)[4]) {
  const uint16_t* from = row + column;
  if (whole_quad<8>(from, column, cols)) {
    const uint2 quad = *reinterpret_cast<const uint2*>(from);
    out[0] = static_cast<uint16_t>(quad.x);
    out[1] = static_cast<uint16_t>(quad.x >> 16);
    out[2] = static_cast<uint16_t>(quad.y);
    out[3] = static_cast<uint16_t>(quad.y >> 16);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = column + e < cols ? from[e] : uint16_t{0};
}

__device__ inline void store_halves(uint16_t* row, int64_t column, int64_t cols,
                                    const uint16_t (&in)[4]) {
  uint16_t* to = row + column;
  if (whole_quad<8>(to, column, cols)) {
    *reinterpret_cast<uint2*>(to) = make_uint2(in[0] | static_cast<uint32_t>(in[1]) << 16,
                                               in[2] | static_cast<uint32_t>(in[3]) << 16);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < cols) to[e] = in[e];
  }
}

__device__ inline void load_bytes(const uint8_t* row, int64_t column, int64_t cols,
                                  uint8_t (&out)[4]) {
  const uint8_t* from = row + column;
  if (whole_quad<4>(from, column, cols)) {
    const uint32_t quad = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) out[e] = static_cast<uint8_t>(quad >> (8 * e));
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = column + e < cols ? from[e] : uint8_t{0};
}

__device__ inline void store_bytes(uint8_t* row, int64_t column, int64_t cols,
                                   const uint8_t (&in)[4]) {
  uint8_t* to = row + column;
  if (whole_quad<4>(to, column, cols)) {
    *reinterpret_cast<uint32_t*>(to) = in[0] | static_cast<uint32_t>(in[1]) << 8 |
                                       static_cast<uint32_t>(in[2]) << 16 |
                                       static_cast<uint32_t>(in[3]) << 24;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < cols) to[e] = in[e];
  }
}

// Float32 values of a quad of a row of any dtype, 0 beyond the row.
__device__ inline void load_quad(const void* row, int dtype, int64_t column, int64_t cols,
                                 float (&out)[4]) {
  if (dtype == kFloat32) {
    load_floats(static_cast<const float*>(row), column, cols, out);
    return;
  }
  uint16_t halves[4];
  load_halves(static_cast<const uint16_t*>(row), column, cols, halves);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    out[e] = dtype == kBFloat16 ? bf16_bits_to_float(halves[e]) : fp16_bits_to_float(halves[e]);
}

}  // namespace gemmascope_fast
