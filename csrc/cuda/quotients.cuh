// Square roots and quotients in the middle of the range of floats, rounded as IEEE 754 asks, without a branch: those of
// several elements overlap. __fsqrt_rn and __fdiv_rn ask about every element, and call a function for a zero.
//
//   y ~ 1 / sqrt(v), s = v y, h = y / 2:  e = 1/2 - s h;  s += s e;  h += h e;  s += (v - s s) h
//   y ~ 1 / b:  y += y (1 - b y);  q = a y;  q -= (b q - a) y;  q -= (b q - a) y
//
// The root is right from every y within 3 units in the last place: tried on all mantissas. So is the quotient within 2,
// but for four divisors just below a power of two: with b in [1, 2) no quotient is closer to the middle between two
// floats than 2^-24 / b units, and b |1 - b y| < 2^-23 was tried on all mantissas. A GPU's y is within 2.2 and 1.
// Source: Markstein 1990, IBM J. Res. Dev. 34(1), "Computation of elementary functions on the IBM RISC System/6000".
#pragma once

#include "cuda/rounded.cuh"

namespace gemmascope_fast {

GSF_BOTH float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

GSF_BOTH float near_reciprocal(float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return y;
#else
  return 1.0f / b;
#endif
}

GSF_BOTH float near_inverse_root(float v) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
#else
  return 1.0f / std::sqrt(v);
#endif
}

GSF_BOTH float root_from(float v, float y) {
  float s = rounded_mul(v, y), h = rounded_mul(y, 0.5f);
  const float e = fused_multiply_add(-s, h, 0.5f);
  s = fused_multiply_add(s, e, s);
  h = fused_multiply_add(h, e, h);
  return fused_multiply_add(fused_multiply_add(-s, s, v), h, s);
}

GSF_BOTH float better_reciprocal(float b, float y) {
  return fused_multiply_add(y, fused_multiply_add(-b, y, 1.0f), y);
}

// b > 0. A quotient of zero keeps a's sign, which a - b q would lose.
GSF_BOTH float quotient_from(float a, float b, float y) {
  y = better_reciprocal(b, y);
  float q = rounded_mul(a, y);
  q = fused_multiply_add(-fused_multiply_add(b, q, -a), y, q);
  return fused_multiply_add(-fused_multiply_add(b, q, -a), y, q);
}

GSF_BOTH float middle_root(float v) { return root_from(v, near_inverse_root(v)); }
GSF_BOTH float middle_quotient(float a, float b) { return quotient_from(a, b, near_reciprocal(b)); }

// ---- what the middle is, for four at a time

GSF_BOTH uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
GSF_BOTH uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Bits of 2^exponent.
GSF_BOTH constexpr uint32_t power_bits(int exponent) {
  return static_cast<uint32_t>(exponent + 127) << 23;
}

// 2^-100 <= v < 2^48: neither zero nor NaN.
GSF_BOTH bool middle_squares(const float (&v)[4]) {
  uint32_t low = bits_of(v[0]), high = low;
  for (int e = 1; e < 4; ++e) {
    low = smaller(low, bits_of(v[e]));
    high = larger(high, bits_of(v[e]));
  }
  return (low >= power_bits(-100)) & (high < power_bits(48));
}

// 2^-84 <= |a| < 2^60, or zero.
GSF_BOTH bool middle_numerators(const float (&a)[4]) {
  uint32_t low = 0xffffffffu, high = 0;
  for (int e = 0; e < 4; ++e) {
    const uint32_t twice = bits_of(a[e]) << 1;  // without the sign
    low = smaller(low, twice - 1);              // a zero is the largest
    high = larger(high, twice);
  }
  return (low >= 2 * power_bits(-84) - 1) & (high < 2 * power_bits(60));
}

// Of positive divisors; the caller knows that they lie between 2^-60 and 2^36, so that no quotient leaves the range.
GSF_BOTH bool plain_divisors(const float (&b)[4]) {
  uint32_t high = 0;
  for (int e = 0; e < 4; ++e) high = larger(high, bits_of(b[e]) << 9);
  return high < 0x7ffff8u << 9;
}

}  // namespace gemmascope_fast
