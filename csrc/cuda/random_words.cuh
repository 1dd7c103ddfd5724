// Random bits of the optimizer, and the stochastic rounding that uses them.
//
//   word c % 4 of Philox 4x32-7 at the counter (c // 4, row, row // 2^32, step), key = seed
//
// Counter-based: any thread makes the words of any four columns, and every backend makes the same ones.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". 14 wide products per four words,
// of which the lower 16 bits round a weight and the upper 20 a second moment.
#pragma once

#include "cuda/rounded.cuh"

namespace gemmascope_fast {

struct RandomQuad {
  uint32_t word[4];
};

// What all words of a row share.
struct RandomRow {
  uint64_t seed, row, step;
};

struct WideProduct {
  uint32_t low, high;
};

GSF_BOTH WideProduct wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  WideProduct product;  // from a shift of 64 bits the compiler adds a zero to every high half
  asm("{.reg .b64 t; mul.wide.u32 t, %2, %3; mov.b64 {%0, %1}, t;}"
      : "=r"(product.low), "=r"(product.high)
      : "r"(a), "r"(b));
  return product;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
#endif
}

// The words of columns 4 quad to 4 quad + 3.
GSF_BOTH RandomQuad random_quad(const RandomRow& of, uint32_t quad) {
  uint32_t c0 = quad, c1 = static_cast<uint32_t>(of.row), c2 = static_cast<uint32_t>(of.row >> 32),
           c3 = static_cast<uint32_t>(of.step);
  uint32_t k0 = static_cast<uint32_t>(of.seed), k1 = static_cast<uint32_t>(of.seed >> 32);
#ifdef __CUDA_ARCH__
  asm volatile(""
               : "+r"(k0),
                 "+r"(k1));  // else a loop over quads keeps the keys of all rounds in registers
#endif
  for (int round = 0; round < 7; ++round) {
    const WideProduct first = wide_product(c0, 0xd2511f53u);
    const WideProduct second = wide_product(c2, 0xcd9e8d57u);
    c0 = second.high ^ c1 ^ k0;
    c1 = second.low;
    c2 = first.high ^ c3 ^ k1;
    c3 = first.low;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bits of w as bfloat16: up with the probability of the part that is cut off. A NaN must not become infinite.
GSF_BOTH uint16_t round_stochastically(float w, uint32_t random) {
  const uint32_t bits = bits_of(w);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return static_cast<uint16_t>((finite ? bits + (random & 0xffffu) : bits) >> 16);
}

// Four of them, in pairs: the first of a pair in the low half.
GSF_BOTH void round_stochastically(const float (&w)[4], const uint32_t (&random)[4],
                                   uint32_t (&out)[2]) {
  uint32_t up[4], largest = 0;
  for (int e = 0; e < 4; ++e) {
    const uint32_t twice = bits_of(w[e]) << 1;  // without the sign
    largest = twice > largest ? twice : largest;
    up[e] = bits_of(w[e]) + (random[e] & 0xffffu);
  }
  if (__builtin_expect(largest >= 0xff000000u, 0)) {  // infinite or NaN
    for (int e = 0; e < 4; ++e)
      up[e] = static_cast<uint32_t>(round_stochastically(w[e], random[e])) << 16;
  }
  out[0] = up[0] >> 16 | (up[1] & 0xffff0000u);
  out[1] = up[2] >> 16 | (up[3] & 0xffff0000u);
}

}  // namespace gemmascope_fast
