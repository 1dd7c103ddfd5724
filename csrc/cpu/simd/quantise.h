// int8 codes of 16 rotated rows that lie in the lanes, and the norms that the bounds are made of.
//
//   y = H(row - subtract) / scale,  p = round(y),  f = round(fine_unit (y - p)),  a scale for each chunk of d
//
// Algorithm: with one row per lane a Hadamard butterfly is an addition and a subtraction of registers at any distance: 16
// points, then the remaining 4 to 16. Element k = t * (d / block) + c takes place t of transform c, so that neighbouring
// large dimensions go to different transforms. Included only by csrc/cpu/simd/screen.cpp. Bound: additions, 8 per element.
#pragma once

#include "cpu/simd/f16x.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

// The rows that are worked on at a time: one register's, so that 16 points are as few registers as can be.
#if defined(__AVX2__) && !defined(__AVX512F__)
using Part = __m256;
constexpr int kParts = 2;
static inline Part load_part(const float* p) { return _mm256_loadu_ps(p); }
static inline Part broadcast_part(float s) { return _mm256_set1_ps(s); }
static inline Part fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
static inline Part add(Part a, Part b) { return _mm256_add_ps(a, b); }
static inline Part sub(Part a, Part b) { return _mm256_sub_ps(a, b); }
static inline Part mul(Part a, Part b) { return _mm256_mul_ps(a, b); }
static inline void store(float* p, Part a) { _mm256_storeu_ps(p, a); }
#elif defined(GSF_NEON)
using Part = F4;
constexpr int kParts = 4;
static inline Part load_part(const float* p) { return vld1q_f32(p); }
static inline Part broadcast_part(float s) { return vdupq_n_f32(s); }
#else
using Part = F16x;
constexpr int kParts = 1;
static inline Part load_part(const float* p) { return load(p); }
static inline Part broadcast_part(float s) { return broadcast(s); }
#endif
constexpr int kPartRows = 16 / kParts;

#if defined(__AVX512F__)
static inline F16x max_abs(F16x a, F16x m) { return {_mm512_max_ps(_mm512_abs_ps(a.v), m.v)}; }
// Four vectors rounded to integers: codes of 16 rows, 4 elements each; the integers come back as floats.
static inline void round4(F16x (&y)[4], int8_t* codes) {
  __m512i packed = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    const __m512i p = _mm512_cvtps_epi32(y[e].v);
    y[e].v = _mm512_cvtepi32_ps(p);
    const __m512i byte = _mm512_and_si512(p, _mm512_set1_epi32(0xff));
    packed = _mm512_or_si512(packed, _mm512_slli_epi32(byte, 8 * e));
  }
  _mm512_storeu_si512(codes, packed);
}
#elif defined(__AVX2__)
static inline Part max_abs(Part a, Part m) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return _mm256_max_ps(_mm256_and_ps(a, mask), m);
}
static inline __m256i round8(__m256& y, int e) {
  const __m256i p = _mm256_cvtps_epi32(y);
  y = _mm256_cvtepi32_ps(p);
  return _mm256_slli_epi32(_mm256_and_si256(p, _mm256_set1_epi32(0xff)), 8 * e);
}
static inline void round4(Part (&y)[4], int8_t* codes) {
  __m256i packed = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) packed = _mm256_or_si256(packed, round8(y[e], e));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), packed);
}
#elif defined(GSF_NEON)
static inline F4 max_abs(F4 a, F4 m) {
  const F4 v = vabsq_f32(a);
  return vbslq_f32(vcgtq_f32(v, m), v, m);  // NaN is passed over
}
static inline uint32x4_t round_lanes(F4& y) {
  const int32x4_t p = vcvtnq_s32_f32(y);
  y = vcvtq_f32_s32(p);
  return vreinterpretq_u32_s32(p);
}
static inline void round4(F4 (&y)[4], int8_t* codes) {
  uint32x4_t packed = vsliq_n_u32(round_lanes(y[0]), round_lanes(y[1]), 8);
  packed = vsliq_n_u32(packed, round_lanes(y[2]), 16);
  packed = vsliq_n_u32(packed, round_lanes(y[3]), 24);
  vst1q_s8(codes, vreinterpretq_s8_u32(packed));
}
#else
static inline F16x max_abs(F16x a, F16x m) {
  for (int l = 0; l < 16; ++l) {
    const float v = __builtin_fabsf(a.v[l]);
    m.v[l] = v > m.v[l] ? v : m.v[l];
  }
  return m;
}
static inline void round4(F16x (&y)[4], int8_t* codes) {
  for (int e = 0; e < 4; ++e) {
    for (int l = 0; l < 16; ++l) {
      // Codes of rows that are not finite are never used; the conversion must be defined all the same.
      // A row's largest element can be an ulp above 127.
      const float r = y[e].v[l] > -127.5f && y[e].v[l] < 127.5f ? y[e].v[l] : 0.0f;
      y[e].v[l] = __builtin_rintf(r);
      codes[l * 4 + e] = static_cast<int8_t>(y[e].v[l]);
    }
  }
}
#endif

// In-place Hadamard transform of kPoints registers.
template <int kPoints>
static inline void hadamard(Part (&v)[kPoints]) {
#pragma GCC unroll 4
  for (int half = 1; half < kPoints; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kPoints; ++i) {
      if ((i & half) != 0) continue;
      const Part a = v[i], b = v[i + half];
      v[i] = add(a, b);
      v[i + half] = sub(a, b);
    }
  }
}

struct Sums {
  Part raw[4], dot;
};

// 16 points of a transform, elements first, first + step, ...: read, measured, centred, transformed.
static inline void first_points(const float* rows, int64_t count, int64_t first, int64_t step,
                                const float* subtract, const float* with, Sums& sums, float* to) {
  const Part nothing = broadcast_part(0);
  Part v[16], dot[4] = {nothing, nothing, nothing, nothing};
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t k = first + i * step;
    v[i] = k < count ? load_part(rows + k * 16) : nothing;
    sums.raw[i % 4] = fma(v[i], v[i], sums.raw[i % 4]);
    if (with != nullptr && k < count) dot[i % 4] = fma(v[i], broadcast_part(with[k]), dot[i % 4]);
    if (subtract != nullptr && k < count) v[i] = sub(v[i], broadcast_part(subtract[k]));
  }
  if (with != nullptr) sums.dot = add(sums.dot, add(add(dot[0], dot[1]), add(dot[2], dot[3])));
  hadamard(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(to + i * 16, v[i]);
}

// The remaining log2(kPoints) stages, over places 16 apart.
template <int kPoints>
static inline void last_points(float* block, Part (&largest)[kParts]) {
  for (int64_t i = 0; i < 16; ++i) {
    for (int part = 0; part < kParts; ++part) {
      float* rows = block + i * 16 + part * kPartRows;
      Part v[kPoints];
#pragma GCC unroll 16
      for (int p = 0; p < kPoints; ++p) v[p] = load_part(rows + p * 256);
      hadamard(v);
#pragma GCC unroll 16
      for (int p = 0; p < kPoints; ++p) {
        largest[part] = max_abs(v[p], largest[part]);
        store(rows + p * 256, v[p]);
      }
    }
  }
}

// A chunk's scales, in place of its largest elements, and their inverses. Next to a much larger chunk of the row they need
// not be finer than 2^-20 of its.
static inline void scales(const float* largest, float code, float* scale, float* inverse) {
  for (int r = 0; r < 16; ++r) {
    const float least = largest[r] * 0x1p-20f, most = scale[r] > least ? scale[r] : least;
    scale[r] = most > 0 ? most / code : 1.0f;
    inverse[r] = most > 0 ? code / most : 1.0f;
  }
}

static inline void store_sum(float* to, const Part (&part)[4]) {
  store(to, add(add(part[0], part[1]), add(part[2], part[3])));
}

struct CodeSums {
  Part size[4], code[4], error[4], rest[4], sum[4];
};

// Elements [k, k + 4) of the rows.
static inline void code4(const float* work, Part inverse, float unit, int8_t* codes, int8_t* fine,
                         CodeSums& sums) {
  Part y[4], p[4], f[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) p[e] = y[e] = mul(load_part(work + e * 16), inverse);
  round4(p, codes);
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    sums.size[e] = fma(y[e], y[e], sums.size[e]);
    sums.code[e] = fma(p[e], p[e], sums.code[e]);
    sums.sum[e] = add(sums.sum[e], p[e]);  // integers below 2^24: exact up to d = 131072
    y[e] = sub(y[e], p[e]);
    sums.error[e] = fma(y[e], y[e], sums.error[e]);
    f[e] = mul(y[e], broadcast_part(unit));
  }
  if (fine == nullptr) return;
  round4(f, fine);
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    y[e] = sub(y[e], mul(f[e], broadcast_part(1 / unit)));
    sums.rest[e] = fma(y[e], y[e], sums.rest[e]);
  }
}

static inline void store_integers(int32_t* to, const Part (&part)[4]) {
  float sums[kPartRows];
  store_sum(sums, part);
  for (int r = 0; r < kPartRows; ++r) {
    const bool finite = sums[r] > -1e9f && sums[r] < 1e9f;
    to[r] = finite ? static_cast<int32_t>(sums[r]) : 0;
  }
}

// Rows [row, row + kPartRows).
static void codes_of(const float* work, int64_t width, int row, const float* inverse, float unit,
                     int8_t* codes, int8_t* fine, QuantisedChunk* out) {
  const Part own = load_part(inverse + row);
  CodeSums sums;
  for (int e = 0; e < 4; ++e) {
    sums.size[e] = sums.code[e] = sums.error[e] = sums.rest[e] = sums.sum[e] = broadcast_part(0);
  }
  for (int64_t k = 0; k < width; k += 4) {
    const int64_t at = k * 16 + row * 4;
    code4(work + k * 16 + row, own, unit, codes + at, fine == nullptr ? nullptr : fine + at, sums);
  }
  store_sum(out->y_squared + row, sums.size);
  store_sum(out->p_squared + row, sums.code);
  store_sum(out->error_squared + row, sums.error);
  store_sum(out->fine_squared + row, sums.rest);
  store_integers(out->sum + row, sums.sum);
}

static void quantise(const float* rows, int64_t count, int64_t d, float code, const float* subtract,
                     const float* with, float* work, int8_t* codes, int8_t* fine,
                     QuantisedRows* out, QuantisedChunk* chunks) {
  const int64_t block = hadamard_block(d), step = d / block, width = screen_chunk(d);
  const Part nothing = broadcast_part(0);
  Sums sums[kParts];
  Part all[kParts];
  for (int p = 0; p < kParts; ++p) {
    sums[p] = {{nothing, nothing, nothing, nothing}, nothing};
    all[p] = nothing;
  }
  for (int64_t k = 0; k < d; k += width) {
    Part largest[kParts];
    for (int p = 0; p < kParts; ++p) largest[p] = nothing;
    for (int64_t c = k / block; c < (k + width) / block; ++c) {
      float* to = work + c * block * 16;
      for (int64_t t = 0; t < block; t += 16) {
        for (int p = 0; p < kParts; ++p) {
          first_points(rows + p * kPartRows, count, t * step + c, step, subtract, with, sums[p],
                       to + t * 16 + p * kPartRows);
        }
      }
      if (block == 64) last_points<4>(to, largest);
      if (block == 128) last_points<8>(to, largest);
      if (block == 256) last_points<16>(to, largest);
    }
    for (int p = 0; p < kParts; ++p) {
      all[p] = max_abs(largest[p], all[p]);
      store(chunks[k / width].scale + p * kPartRows, largest[p]);
    }
  }
  for (int p = 0; p < kParts; ++p) {
    store_sum(out->raw_squared + p * kPartRows, sums[p].raw);
    store(out->dot + p * kPartRows, sums[p].dot);
    store(out->largest + p * kPartRows, all[p]);
  }
  for (int64_t k = 0; k < d; k += width) {
    QuantisedChunk* chunk = chunks + k / width;
    float inverse[16];
    scales(out->largest, code, chunk->scale, inverse);
    for (int row = 0; row < 16; row += kPartRows) {
      codes_of(work + k * 16, width, row, inverse, fine_unit(code), codes + k * 16,
               fine == nullptr ? nullptr : fine + k * 16, chunk);
    }
  }
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
