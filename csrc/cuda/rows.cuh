// Rows of matrices in three dtypes: 16-byte loads, widening to float32, rounding once on the way out.
//
// A *chunk* is 8 neighbouring columns: 16 bytes of a 16-bit dtype, 32 bytes of float32. Rows are `wide` when every
// chunk can be read in whole 16-byte words; the others are read element by element, as float32 from then on.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {

constexpr int kChunk = 8;
constexpr int kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2;  // as Dtype in common/matrix.h
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// rows x cols elements; strides in elements.
struct Rows {
  const void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  int dtype;
  int wide;  // col_stride 1, cols a multiple of 8, every row starts on 16 bytes and is less than 2^31 bytes apart
};

// The same, written.
struct Target {
  void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  int dtype;
  int wide;
};

inline bool rows_are_wide(const void* data, int dtype, int64_t cols, int64_t row_stride,
                          int64_t col_stride) {
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols % kChunk == 0 &&
         (col_stride == 1 || cols == 0) && row_stride * size % 16 == 0 && row_stride >= 0 &&
         row_stride < int64_t{1} << 29;
}

// Columns [begin, begin + cols) of rows or of a target.
template <class Any>
inline Any columns_of(Any m, int64_t begin, int64_t cols) {
  const int64_t bytes = begin * m.col_stride * (m.dtype == kFloat32 ? 4 : 2);
  m.data = (decltype(m.data))(reinterpret_cast<uintptr_t>(m.data) + static_cast<uintptr_t>(bytes));
  m.cols = cols;
  m.wide = rows_are_wide(m.data, m.dtype, cols, m.row_stride, m.col_stride) ? 1 : 0;
  return m;
}

// ---- one element

__device__ inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline float bf16_bits_to_float(uint32_t bits) { return bits_to_float(bits << 16); }

__device__ inline float fp16_bits_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline float load_element(const void* data, int dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[at];
  const uint32_t bits = static_cast<const uint16_t*>(data)[at];
  return dtype == kBFloat16 ? bf16_bits_to_float(bits) : fp16_bits_to_float(bits);
}

__device__ inline uint32_t round_to_bits(float value, int dtype) {
  return dtype == kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                            : __half_as_ushort(__float2half_rn(value));
}

__device__ inline void store_element(void* data, int dtype, int64_t at, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(round_to_bits(value, dtype));
  }
}

// ---- 16-byte words

__device__ inline void widen_bf16(const uint4& raw, float (&out)[8]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_to_float(word[i] << 16);
    out[2 * i + 1] = bits_to_float(word[i] & 0xffff0000u);
  }
}

__device__ inline void widen_fp16(const uint4& raw, float (&out)[8]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = fp16_bits_to_float(word[i] & 0xffffu);
    out[2 * i + 1] = fp16_bits_to_float(word[i] >> 16);
  }
}

__device__ inline void widen_fp32(const uint4& raw, float* out) {
  out[0] = bits_to_float(raw.x);
  out[1] = bits_to_float(raw.y);
  out[2] = bits_to_float(raw.z);
  out[3] = bits_to_float(raw.w);
}

__device__ inline uint4 pack_fp32(const float* v) {
  uint4 raw;
  raw.x = __float_as_uint(v[0]);
  raw.y = __float_as_uint(v[1]);
  raw.z = __float_as_uint(v[2]);
  raw.w = __float_as_uint(v[3]);
  return raw;
}

// A chunk as it lies in memory: the second word is for float32 only.
__device__ inline void widen_chunk(const uint4& first, const uint4& second, int dtype,
                                   float (&out)[8]) {
  if (dtype == kBFloat16) {
    widen_bf16(first, out);
  } else if (dtype == kFloat16) {
    widen_fp16(first, out);
  } else {
    widen_fp32(first, out);
    widen_fp32(second, out + 4);
  }
}

// ---- chunks of a row

// What a chunk of these rows is once it has been read: rows that are not wide become float32.
__device__ inline int chunk_dtype(const Rows& m) { return m.wide ? m.dtype : kFloat32; }

// 16-byte words of such a chunk.
__host__ __device__ inline int chunk_words(const Rows& m) {
  return m.wide && m.dtype != kFloat32 ? 1 : 2;
}

__device__ inline const char* chunk_address(const Rows& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) +
         (row * m.row_stride + col) * (m.dtype == kFloat32 ? 4 : 2);
}

// Columns [col, col + 8) of a row that is not wide; 0 beyond the last.
__device__ inline void load_narrow(const Rows& m, int64_t row, int64_t col, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t at = row * m.row_stride + (col + i) * m.col_stride;
    out[i] = col + i < m.cols ? load_element(m.data, m.dtype, at) : 0.0f;
  }
}

// The address of a chunk of row 0, and bytes from row to row, of wide rows.
__device__ inline const char* first_chunk(const Rows& m, int64_t col) {
  return static_cast<const char*>(m.data) + col * (m.dtype == kFloat32 ? 4 : 2);
}

__device__ inline uint32_t row_bytes(const Rows& m) {
  return static_cast<uint32_t>(m.row_stride) * (m.dtype == kFloat32 ? 4 : 2);
}

// 16 bytes of memory that nobody writes meanwhile, or zeros and no access. A branch around a load would make the
// compiler wait for it before the next one; written this way, loads are issued one after the other.
__device__ inline uint4 load_if(bool wanted, const char* from) {
  uint4 v = make_uint4(0, 0, 0, 0);
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %5, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
#else
  if (wanted) v = *reinterpret_cast<const uint4*>(from);
#endif
  return v;
}

// The same for 4 bytes; `otherwise` where nothing is wanted.
__device__ inline uint32_t load_if(bool wanted, const void* from, uint32_t otherwise) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %2, 0;\n"
      "@wanted ld.global.nc.u32 %0, [%1];\n"
      "}\n"
      : "+r"(otherwise)
      : "l"(from), "r"(static_cast<int>(wanted)));
  return otherwise;
#else
  return wanted ? *static_cast<const uint32_t*>(from) : otherwise;
#endif
}

// Adds what `out` holds at columns [col, col + kColumns).
template <int kColumns>
__device__ inline void add_target(const Target& out, int64_t row, int64_t col,
                                  float (&v)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int64_t at = row * out.row_stride + (col + i) * out.col_stride;
    if (col + i < out.cols) v[i] += load_element(out.data, out.dtype, at);
  }
}

// Writes columns [col, col + kColumns) of a row, kColumns 4 or 8 and col a multiple of it.
template <int kColumns>
__device__ inline void store_target(const Target& out, int64_t row, int64_t col,
                                    const float (&v)[kColumns]) {
  const int64_t at = row * out.row_stride + col * out.col_stride;
  if (!out.wide) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (col + i < out.cols) {
        store_element(out.data, out.dtype, at + i * out.col_stride, v[i]);
      }
    }
    return;
  }
  if (col >= out.cols) return;
  if (out.dtype == kFloat32) {
    uint4* to = reinterpret_cast<uint4*>(static_cast<float*>(out.data) + at);
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) to[i] = pack_fp32(v + 4 * i);
    return;
  }
  uint32_t word[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    word[i] = round_to_bits(v[2 * i], out.dtype) | round_to_bits(v[2 * i + 1], out.dtype) << 16;
  }
  uint16_t* to = static_cast<uint16_t*>(out.data) + at;
  if constexpr (kColumns == 8) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(word[0], word[1], word[kColumns / 2 - 2], word[kColumns / 2 - 1]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
  }
}

// acc += factor * v, and acc + <v, w>: one rounding per element, whatever the compiler.
__device__ inline void add_chunk(float factor, const float (&v)[kChunk], float (&acc)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) acc[i] = fmaf(factor, v[i], acc[i]);
}

__device__ inline float dot_chunk(const float (&v)[kChunk], const float (&w)[kChunk], float acc) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) acc = fmaf(v[i], w[i], acc);
  return acc;
}

// Sum over the lanes of a warp by a fixed tree; every lane has the result.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(kAllLanes, v, distance);
  }
  return v;
}

}  // namespace gemmascope_fast
