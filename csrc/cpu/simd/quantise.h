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
static inline F16x max_abs(F16x a, F16x m) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_max_ps(_mm256_and_ps(a.lo, mask), m.lo),
          _mm256_max_ps(_mm256_and_ps(a.hi, mask), m.hi)};
}
static inline __m256i round8(__m256& y, int e) {
  const __m256i p = _mm256_cvtps_epi32(y);
  y = _mm256_cvtepi32_ps(p);
  return _mm256_slli_epi32(_mm256_and_si256(p, _mm256_set1_epi32(0xff)), 8 * e);
}
static inline void round4(F16x (&y)[4], int8_t* codes) {
  __m256i lo = _mm256_setzero_si256(), hi = lo;
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    lo = _mm256_or_si256(lo, round8(y[e].lo, e));
    hi = _mm256_or_si256(hi, round8(y[e].hi, e));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32), hi);
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
static inline void hadamard(F16x (&v)[kPoints]) {
#pragma GCC unroll 4
  for (int half = 1; half < kPoints; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kPoints; ++i) {
      if ((i & half) != 0) continue;
      const F16x a = v[i], b = v[i + half];
      v[i] = add(a, b);
      v[i + half] = sub(a, b);
    }
  }
}

struct Sums {
  F16x raw[4], dot;
};

// 16 points of a transform, elements first, first + step, ...: read, measured, centred, transformed.
static inline void first_points(const float* rows, int64_t count, int64_t first, int64_t step,
                                const float* subtract, const float* with, Sums& sums, float* to) {
  F16x v[16], dot[4] = {zero(), zero(), zero(), zero()};
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t k = first + i * step;
    v[i] = k < count ? load(rows + k * 16) : zero();
    sums.raw[i % 4] = fma(v[i], v[i], sums.raw[i % 4]);
    if (with != nullptr && k < count) dot[i % 4] = fma(v[i], broadcast(with[k]), dot[i % 4]);
    if (subtract != nullptr && k < count) v[i] = sub(v[i], broadcast(subtract[k]));
  }
  if (with != nullptr) sums.dot = add(sums.dot, add(add(dot[0], dot[1]), add(dot[2], dot[3])));
  hadamard(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(to + i * 16, v[i]);
}

// The remaining log2(kPoints) stages, over places 16 apart.
template <int kPoints>
static inline F16x last_points(float* block, F16x largest) {
  for (int64_t i = 0; i < 16; ++i) {
    F16x v[kPoints];
#pragma GCC unroll 16
    for (int p = 0; p < kPoints; ++p) v[p] = load(block + (p * 16 + i) * 16);
    hadamard(v);
#pragma GCC unroll 16
    for (int p = 0; p < kPoints; ++p) {
      largest = max_abs(v[p], largest);
      store(block + (p * 16 + i) * 16, v[p]);
    }
  }
  return largest;
}

// A chunk's scales and their inverses. Next to a much larger chunk of the row they need not be finer than 2^-20 of its.
static inline F16x scales(F16x own, const float* largest, float code, float* scale) {
  float chunk[16], inverse[16];
  store(chunk, own);
  for (int r = 0; r < 16; ++r) {
    const float least = largest[r] * 0x1p-20f, most = chunk[r] > least ? chunk[r] : least;
    scale[r] = most > 0 ? most / code : 1.0f;
    inverse[r] = most > 0 ? code / most : 1.0f;
  }
  return load(inverse);
}

static inline void store_sum(float* to, const F16x (&part)[4]) {
  store(to, add(add(part[0], part[1]), add(part[2], part[3])));
}

struct CodeSums {
  F16x size[4], code[4], error[4], rest[4], sum[4];
};

// Elements [k, k + 4) of 16 rows.
static inline void code4(const float* work, F16x inverse, float unit, int8_t* codes, int8_t* fine,
                         CodeSums& sums) {
  F16x y[4], p[4], f[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) p[e] = y[e] = mul(load(work + e * 16), inverse);
  round4(p, codes);
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    sums.size[e] = fma(y[e], y[e], sums.size[e]);
    sums.code[e] = fma(p[e], p[e], sums.code[e]);
    sums.sum[e] = add(sums.sum[e], p[e]);  // integers below 2^24: exact up to d = 131072
    y[e] = sub(y[e], p[e]);
    sums.error[e] = fma(y[e], y[e], sums.error[e]);
    f[e] = mul(y[e], broadcast(unit));
  }
  if (fine == nullptr) return;
  round4(f, fine);
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    y[e] = sub(y[e], mul(f[e], broadcast(1 / unit)));
    sums.rest[e] = fma(y[e], y[e], sums.rest[e]);
  }
}

static inline void store_integers(int32_t* to, const F16x (&part)[4]) {
  float sums[16];
  store_sum(sums, part);
  for (int r = 0; r < 16; ++r) {
    const bool finite = sums[r] > -1e9f && sums[r] < 1e9f;
    to[r] = finite ? static_cast<int32_t>(sums[r]) : 0;
  }
}

static void codes_of(const float* work, int64_t width, F16x inverse, float unit, int8_t* codes,
                     int8_t* fine, QuantisedChunk* out) {
  CodeSums sums;
  for (int e = 0; e < 4; ++e) {
    sums.size[e] = sums.code[e] = sums.error[e] = sums.rest[e] = sums.sum[e] = zero();
  }
  for (int64_t k = 0; k < width; k += 4) {
    int8_t* own = fine == nullptr ? nullptr : fine + k * 16;
    code4(work + k * 16, inverse, unit, codes + k * 16, own, sums);
  }
  store_sum(out->y_squared, sums.size);
  store_sum(out->p_squared, sums.code);
  store_sum(out->error_squared, sums.error);
  store_sum(out->fine_squared, sums.rest);
  store_integers(out->sum, sums.sum);
}

static void quantise(const float* rows, int64_t count, int64_t d, float code, const float* subtract,
                     const float* with, float* work, int8_t* codes, int8_t* fine,
                     QuantisedRows* out, QuantisedChunk* chunks) {
  const int64_t block = hadamard_block(d), step = d / block, width = screen_chunk(d);
  Sums sums = {{zero(), zero(), zero(), zero()}, zero()};
  F16x all = zero();
  for (int64_t k = 0; k < d; k += width) {
    F16x largest = zero();
    for (int64_t c = k / block; c < (k + width) / block; ++c) {
      float* to = work + c * block * 16;
      for (int64_t t = 0; t < block; t += 16) {
        first_points(rows, count, t * step + c, step, subtract, with, sums, to + t * 16);
      }
      if (block == 64) largest = last_points<4>(to, largest);
      if (block == 128) largest = last_points<8>(to, largest);
      if (block == 256) largest = last_points<16>(to, largest);
    }
    all = max_abs(largest, all);
    store(chunks[k / width].scale, largest);
  }
  store_sum(out->raw_squared, sums.raw);
  store(out->dot, sums.dot);
  store(out->largest, all);
  for (int64_t k = 0; k < d; k += width) {
    QuantisedChunk* chunk = chunks + k / width;
    const F16x inverse = scales(load(chunk->scale), out->largest, code, chunk->scale);
    codes_of(work + k * 16, width, inverse, fine_unit(code), codes + k * 16,
             fine == nullptr ? nullptr : fine + k * 16, chunk);
  }
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
