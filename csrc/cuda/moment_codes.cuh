// Second moments in 8 bits: the float's own bits less a base, cut to 5 exponent and 3 mantissa bits.
//
//   value = 2^(e - 31) 2^(code // 8) (1 + code % 8 / 8),   e the exponent of 128 columns; code 0 is 0
//
// What is cut is rounded up with its probability: the decay by 0.999, far below a code's step, is not lost. A NaN is
// code 255 of a block whose exponent is 255. 1.01 bytes per element.
#pragma once

#include "cuda/rounded.cuh"

namespace gemmascope_fast {

constexpr int kMomentColumns = 128;  // that share one exponent

GSF_BOTH float decode_moment(uint8_t code, uint8_t exponent) {
  // At most (255 - 31) 2^23 + 255 2^20 = 0x7ff00000, a NaN: no overflow.
  const int32_t bits =
      (static_cast<int32_t>(exponent) - 31) * (1 << 23) + static_cast<int32_t>(code) * (1 << 20);
  return float_of(bits < 0 || code == 0 ? 0u : static_cast<uint32_t>(bits));
}

// Four codes of one block.
GSF_BOTH void decode_moments(uint32_t codes, uint32_t exponent, float (&v)[4]) {
  const int32_t base = (static_cast<int32_t>(exponent) - 31) * (1 << 23);
  const uint32_t fields[4] = {codes << 20, codes << 12, codes << 4, codes >> 4};
  for (int e = 0; e < 4; ++e) {
    const int32_t field = static_cast<int32_t>(fields[e] & 0x0ff00000u);
    const int32_t bits = base + field < 0 ? 0 : base + field;
    v[e] = float_of(field == 0 ? 0u : static_cast<uint32_t>(bits));
  }
}

// What is compared to find the largest moment of a block. A NaN may be negative.
GSF_BOTH uint32_t moment_bits(float v) { return bits_of(v) & 0x7fffffffu; }

// The exponent of a block from its largest moment_bits.
GSF_BOTH int moment_exponent(uint32_t largest) {
  const uint32_t field = (largest + (1u << 20)) >> 23;
  return field > 255 ? 255 : static_cast<int>(field);
}

// bits = moment_bits of an element, at most the largest of the block whose exponent is given.
GSF_BOTH uint8_t encode_moment(uint32_t bits, int exponent, uint32_t random) {
  if (bits == 0) return 0;
  if (bits > 0x7f800000u) return 255;
  // By eighths of an octave: above the base at most 2^28, below it as little as -2^31.
  const int32_t above =
      static_cast<int32_t>(bits) - (exponent - 31) * (1 << 23) + static_cast<int32_t>(random >> 12);
  const int32_t code = above < 0 ? 0 : above >> 20;
  return static_cast<uint8_t>(code > 255 ? 255 : code);
}

// Four codes of one block.
GSF_BOTH uint32_t encode_moments(const uint32_t (&bits)[4], int exponent,
                                 const uint32_t (&random)[4]) {
  uint32_t codes = 0;
  for (int e = 0; e < 4; ++e) {
    codes |= static_cast<uint32_t>(encode_moment(bits[e], exponent, random[e])) << (8 * e);
  }
  return codes;
}

// The same of numbers that are positive and finite: `above` stays below 2^28.
GSF_BOTH uint32_t encode_positive_moments(const uint32_t (&bits)[4], int exponent,
                                          const uint32_t (&random)[4]) {
  const int32_t base = (exponent - 31) * (1 << 23);
  uint32_t codes = 0;
  for (int e = 0; e < 4; ++e) {
    const int32_t above =
        static_cast<int32_t>(bits[e]) - base + static_cast<int32_t>(random[e] >> 12);
    codes |= static_cast<uint32_t>(above < 0 ? 0 : above) >> 20 << (8 * e);
  }
  return codes;
}

}  // namespace gemmascope_fast
