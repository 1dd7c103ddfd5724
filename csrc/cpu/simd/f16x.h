// Sixteen float lanes, the unit of the canonical dot product, on whatever the translation unit is compiled for.
//
//   reduce(a) = ((a[l] + a[l+8]) -> (l, l+4) -> (l, l+2) -> (l, l+1)), the same tree in every variant
//
// Included only by csrc/cpu/simd/*.cpp, each compiled once per target with GSF_TARGET set to the namespace's name. No
// standard-library template may be instantiated here: a COMDAT copy compiled for AVX-512 could be linked into the generic
// path and fault on older machines.
#pragma once

#include <stdint.h>
#include <string.h>

// GCC 12 takes the deliberately undefined operands of its own AVX-512 intrinsics for mistakes (GCC bug 105593).
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef GSF_TARGET
#error "GSF_TARGET must name the target namespace (generic, avx2, avx512)"
#endif

namespace gemmascope_fast {
namespace GSF_TARGET {

constexpr int64_t kLanes = 16;

#if defined(__AVX512F__)

struct F16x {
  __m512 v;
};
static inline F16x zero() { return {_mm512_setzero_ps()}; }
static inline F16x broadcast(float s) { return {_mm512_set1_ps(s)}; }
static inline F16x load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F16x a) { _mm512_storeu_ps(p, a.v); }
static inline F16x fma(F16x a, F16x b, F16x c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F16x add(F16x a, F16x b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F16x sub(F16x a, F16x b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F16x mul(F16x a, F16x b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F16x div(F16x a, F16x b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F16x sqrt(F16x a) { return {_mm512_sqrt_ps(a.v)}; }
static inline F16x load_bf16(const uint16_t* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline F16x load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline __m256 fold8(F16x a) {
  __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), hi);
}

#elif defined(__AVX2__)

struct F16x {
  __m256 lo, hi;
};
static inline F16x zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F16x broadcast(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
static inline F16x load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F16x a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline F16x fma(F16x a, F16x b, F16x c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline F16x add(F16x a, F16x b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
static inline F16x sub(F16x a, F16x b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
static inline F16x mul(F16x a, F16x b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
static inline F16x div(F16x a, F16x b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
static inline F16x sqrt(F16x a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
static inline __m256 widen_bf16(const uint16_t* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline F16x load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
static inline F16x load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline __m256 fold8(F16x a) { return _mm256_add_ps(a.lo, a.hi); }

#else

struct F16x {
  float v[16];
};
static inline F16x zero() { return F16x{}; }
static inline F16x broadcast(float s) {
  F16x r;
  for (int l = 0; l < 16; ++l) r.v[l] = s;
  return r;
}
static inline F16x load(const float* p) {
  F16x r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
static inline void store(float* p, F16x a) { memcpy(p, a.v, sizeof(a.v)); }
static inline F16x fma(F16x a, F16x b, F16x c) {
  for (int l = 0; l < 16; ++l) c.v[l] = __builtin_fmaf(a.v[l], b.v[l], c.v[l]);
  return c;
}
static inline F16x add(F16x a, F16x b) {
  for (int l = 0; l < 16; ++l) a.v[l] += b.v[l];
  return a;
}
static inline F16x sub(F16x a, F16x b) {
  for (int l = 0; l < 16; ++l) a.v[l] -= b.v[l];
  return a;
}
static inline F16x mul(F16x a, F16x b) {
  for (int l = 0; l < 16; ++l) a.v[l] *= b.v[l];
  return a;
}
static inline F16x div(F16x a, F16x b) {
  for (int l = 0; l < 16; ++l) a.v[l] /= b.v[l];
  return a;
}
static inline F16x sqrt(F16x a) {
  for (int l = 0; l < 16; ++l) a.v[l] = __builtin_sqrtf(a.v[l]);
  return a;
}
static inline F16x load_bf16(const uint16_t* p) {
  F16x r;
  for (int l = 0; l < 16; ++l) {
    uint32_t bits = static_cast<uint32_t>(p[l]) << 16;
    memcpy(&r.v[l], &bits, 4);
  }
  return r;
}
static inline float fp16_to_float(uint16_t h) {
  // No float32 subnormal on the way: like the conversion instructions, this ignores torch.set_flush_denormal.
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t exponent = h & 0x7c00u;
  const float subnormal = static_cast<float>(h & 0x3ffu) * 0x1p-24f;  // an integer, scaled: exact
  uint32_t bits;
  memcpy(&bits, &subnormal, 4);
  if (exponent != 0) bits = magnitude + (112u << 23);
  if (exponent == 0x7c00u) bits = magnitude | 0x7f800000u;
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline F16x load_fp16(const uint16_t* p) {
  F16x r;
  for (int l = 0; l < 16; ++l) r.v[l] = fp16_to_float(p[l]);
  return r;
}

#endif

static inline float reduce(F16x a) {
#if defined(__AVX512F__) || defined(__AVX2__)
  __m256 s8 = fold8(a);
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
#else
  for (int width = 8; width >= 1; width /= 2) {
    for (int l = 0; l < width; ++l) a.v[l] += a.v[l + width];
  }
  return a.v[0];
#endif
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
