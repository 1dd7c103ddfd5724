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
#elif defined(GSF_NEON)
#include <arm_neon.h>
#endif

#ifndef GSF_TARGET
#error "GSF_TARGET must name the target namespace (generic, avx2, avx512, neon)"
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

#elif defined(GSF_NEON)

using F4 = float32x4_t;
struct F16x {
  F4 a, b, c, d;
};
static inline F4 fma(F4 x, F4 y, F4 z) { return vfmaq_f32(z, x, y); }
static inline F4 add(F4 x, F4 y) { return vaddq_f32(x, y); }
static inline F4 sub(F4 x, F4 y) { return vsubq_f32(x, y); }
static inline F4 mul(F4 x, F4 y) { return vmulq_f32(x, y); }
static inline void store(float* p, F4 x) { vst1q_f32(p, x); }

static inline F16x zero() {
  const F4 v = vdupq_n_f32(0);
  return {v, v, v, v};
}
static inline F16x broadcast(float s) {
  const F4 v = vdupq_n_f32(s);
  return {v, v, v, v};
}
static inline F16x load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
static inline void store(float* p, F16x x) {
  store(p, x.a);
  store(p + 4, x.b);
  store(p + 8, x.c);
  store(p + 12, x.d);
}
static inline F16x fma(F16x x, F16x y, F16x z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b), fma(x.c, y.c, z.c), fma(x.d, y.d, z.d)};
}
static inline F16x add(F16x x, F16x y) {
  return {add(x.a, y.a), add(x.b, y.b), add(x.c, y.c), add(x.d, y.d)};
}
static inline F16x sub(F16x x, F16x y) {
  return {sub(x.a, y.a), sub(x.b, y.b), sub(x.c, y.c), sub(x.d, y.d)};
}
static inline F16x mul(F16x x, F16x y) {
  return {mul(x.a, y.a), mul(x.b, y.b), mul(x.c, y.c), mul(x.d, y.d)};
}
static inline F16x div(F16x x, F16x y) {
  return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)};
}
static inline F16x sqrt(F16x x) {
  return {vsqrtq_f32(x.a), vsqrtq_f32(x.b), vsqrtq_f32(x.c), vsqrtq_f32(x.d)};
}
static inline F4 widen_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
static inline F16x load_bf16(const uint16_t* p) {
  const uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
  return {widen_bf16(vget_low_u16(lo)), widen_bf16(vget_high_u16(lo)), widen_bf16(vget_low_u16(hi)),
          widen_bf16(vget_high_u16(hi))};
}
static inline F4 widen_fp16(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
static inline F16x load_fp16(const uint16_t* p) {
  const uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
  return {widen_fp16(vget_low_u16(lo)), widen_fp16(vget_high_u16(lo)), widen_fp16(vget_low_u16(hi)),
          widen_fp16(vget_high_u16(hi))};
}
static inline F4 fold4(F16x x) { return add(add(x.a, x.c), add(x.b, x.d)); }

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
#elif defined(GSF_NEON)
  const F4 s4 = fold4(a);
  return vpadds_f32(vadd_f32(vget_low_f32(s4), vget_high_f32(s4)));
#else
  for (int width = 8; width >= 1; width /= 2) {
    for (int l = 0; l < width; ++l) a.v[l] += a.v[l + width];
  }
  return a.v[0];
#endif
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
