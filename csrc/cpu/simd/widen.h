// Rows of any layout and dtype turned into rows of float32, sixteen elements at a time: exact for
// bf16 and fp16.
//
//   widen:     target[i] = float(source[i])
//   transpose: target[c * target_stride + r] = float(source[r * source_stride + c])
//
// Included only by csrc/cpu/simd/*.cpp, like f16x.h. Bound: the read of the source.
#pragma once

#include "cpu/simd/f16x.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

static inline F16x load_as(const void* source, int dtype, int64_t i) {
  if (dtype == 0) return load(static_cast<const float*>(source) + i);
  const uint16_t* half = static_cast<const uint16_t*>(source) + i;
  return dtype == 1 ? load_bf16(half) : load_fp16(half);
}

// Fewer than 16 elements, padded with zeros: nothing beyond them is read.
static inline F16x load_tail(const void* source, int dtype, int64_t i, int64_t count) {
  if (dtype == 0) {
    float padded[kLanes] = {};
    memcpy(padded, static_cast<const float*>(source) + i, static_cast<size_t>(count) * 4);
    return load(padded);
  }
  uint16_t padded[kLanes] = {};
  memcpy(padded, static_cast<const uint16_t*>(source) + i, static_cast<size_t>(count) * 2);
  return load_as(padded, dtype, 0);
}

static void widen(const void* source, int dtype, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, load_as(source, dtype, i));
  if (i == count) return;
  float padded[kLanes];
  store(padded, load_tail(source, dtype, i, count - i));
  memcpy(target + i, padded, static_cast<size_t>((count - i) * 4));
}

#if defined(__AVX2__)
// Eight rows of eight, `stride` floats apart, written transposed.
static inline void transpose8(const float* s, int64_t stride, float* t, int64_t target_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(s + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(t + i * target_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(t + (i + 4) * target_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

#if defined(GSF_NEON)
// Four rows of four, `stride` floats apart, written transposed.
static inline void transpose4(const float* s, int64_t stride, float* t, int64_t target_stride) {
  const F4 a = vld1q_f32(s), b = vld1q_f32(s + stride);
  const F4 c = vld1q_f32(s + 2 * stride), d = vld1q_f32(s + 3 * stride);
  const F4 ac0 = vzip1q_f32(a, c), ac1 = vzip2q_f32(a, c);
  const F4 bd0 = vzip1q_f32(b, d), bd1 = vzip2q_f32(b, d);
  vst1q_f32(t, vzip1q_f32(ac0, bd0));
  vst1q_f32(t + target_stride, vzip2q_f32(ac0, bd0));
  vst1q_f32(t + 2 * target_stride, vzip1q_f32(ac1, bd1));
  vst1q_f32(t + 3 * target_stride, vzip2q_f32(ac1, bd1));
}
#endif

#if defined(__AVX512F__)
// Sixteen rows of sixteen. A row's cache line is read once and whole: no staging needed, whatever the stride.
static inline void transpose16(const float* s, int64_t stride, float* t, int64_t target_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(s + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  // a[4 q + c] holds columns c, 4 + c, 8 + c, 12 + c of rows 4 q .. 4 q + 3, a 128-bit lane each.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_ps(t + c * target_stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(t + (c + 4) * target_stride, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(t + (c + 8) * target_stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(t + (c + 12) * target_stride, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}

// Columns [0, result) of 16 rows of float32.
static inline int64_t transpose_whole(const float* source, int64_t source_stride, int64_t cols,
                                      float* target, int64_t target_stride) {
  constexpr int64_t kAhead =
      8 * kLanes;  // rows lie on pages of their own: out of the prefetchers' reach
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    for (int64_t r = 0; r < kLanes; ++r)
      __builtin_prefetch(source + r * source_stride + c + kAhead);
    transpose16(source + c, source_stride, target + c * target_stride, target_stride);
  }
  return c;
}
#endif

// Columns staged at a time: 1 KiB of each source row, so that a page is worth its TLB miss.
constexpr int64_t kStage = 256;

// Up to 16 rows of up to kStage columns, widened. Whole rows one after the other: at a power-of-two
// stride the rows share a cache set, and touching 16 of them line by line evicts each before it is
// used up.
static inline void stage_rows(const void* source, int64_t source_stride, int dtype, int64_t rows,
                              int64_t cols, float (&staged)[kLanes][kStage + kLanes]) {
  const int64_t size = dtype == 0 ? 4 : 2;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      // Another page, out of the hardware prefetchers' reach. An address past the end is harmless.
      __builtin_prefetch(reinterpret_cast<const void*>(
          reinterpret_cast<uintptr_t>(source) +
          static_cast<uintptr_t>(((r + 3) * source_stride + c) * size)));
      const int64_t at = r * source_stride + c;
      store(staged[r] + c, cols - c >= kLanes ? load_as(source, dtype, at)
                                              : load_tail(source, dtype, at, cols - c));
    }
  }
}

static void transpose(const void* source, int64_t source_stride, int dtype, int64_t rows,
                      int64_t cols, float* target, int64_t target_stride) {
  const int64_t size = dtype == 0 ? 4 : 2;
  float staged[kLanes][kStage + kLanes];
  int64_t whole = 0;
#if defined(__AVX512F__)
  if (dtype == 0 && rows == kLanes) {
    whole = transpose_whole(static_cast<const float*>(source), source_stride, cols, target,
                            target_stride);
  }
#endif
  for (int64_t c0 = whole; c0 < cols; c0 += kStage) {
    const int64_t width = cols - c0 < kStage ? cols - c0 : kStage;
    for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
      const int64_t height = rows - r0 < kLanes ? rows - r0 : kLanes;
      stage_rows(static_cast<const char*>(source) + (r0 * source_stride + c0) * size, source_stride,
                 dtype, height, width, staged);
      float* out = target + c0 * target_stride + r0;
      int64_t c = 0;
#if defined(__AVX2__)
      for (; height == kLanes && c + 8 <= width; c += 8) {
        transpose8(&staged[0][c], kStage + kLanes, out + c * target_stride, target_stride);
        transpose8(&staged[8][c], kStage + kLanes, out + c * target_stride + 8, target_stride);
      }
#elif defined(GSF_NEON)
      for (; height == kLanes && c + 4 <= width; c += 4) {
        for (int64_t r = 0; r < kLanes; r += 4) {
          transpose4(&staged[r][c], kStage + kLanes, out + c * target_stride + r, target_stride);
        }
      }
#endif
      for (; c < width; ++c) {
        for (int64_t r = 0; r < height; ++r) out[c * target_stride + r] = staged[r][c];
      }
    }
  }
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
