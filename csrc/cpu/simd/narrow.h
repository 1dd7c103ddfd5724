// float32 to bfloat16 and float16 in integer arithmetic: the same bits in every SIMD target.
#pragma once

#include <stdint.h>
#include <string.h>

#ifndef GSF_TARGET
#error "GSF_TARGET must name the target namespace (generic, avx2, avx512, neon)"
#endif

namespace gemmascope_fast {
namespace GSF_TARGET {

// Round to nearest, ties to even; NaN becomes the quiet NaN torch uses.
static inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline uint16_t to_fp16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
    float f;
    memcpy(&f, &magnitude, 4);
    f += 0.5f;
    memcpy(&magnitude, &f, 4);
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (magnitude >> 13));
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
