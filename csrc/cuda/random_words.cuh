// Random bits of the optimizer, and the stochastic rounding that uses them.
//
//   word c % 4 of Philox 4x32-10 at the counter (c // 4, row, row // 2^32 + 2^31 stream, step), key = seed
//
// Counter-based: any thread makes the words of any four columns, and every backend makes the same ones.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". 20 wide products per four words.
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

// The words of columns 4 quad to 4 quad + 3; stream 0 rounds weights, 1 second moments.
GSF_BOTH RandomQuad random_quad(const RandomRow& of, uint32_t stream, uint32_t quad) {
  uint32_t c0 = quad, c1 = static_cast<uint32_t>(of.row),
           c2 = static_cast<uint32_t>(of.row >> 32) | (stream << 31),
           c3 = static_cast<uint32_t>(of.step);
  uint32_t k0 = static_cast<uint32_t>(of.seed), k1 = static_cast<uint32_t>(of.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xd2511f53u;
    const uint64_t second = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
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

}  // namespace gemmascope_fast
