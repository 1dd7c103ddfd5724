// The screening tile in AMX's tile registers: 16 tokens x 48 latents.
//
// Algorithm: for 64 elements of d, a register of tokens (16 rows of 64 bytes) and three of latents, whose codes already lie as
// the instruction takes its second operand; three accumulators of 16 x 16. A chunk's sums pass through 3 KiB of L1 to the
// 512-bit registers, which scale, add and compare as the tile without AMX does: the same bits. Bound: the tile product, one
// row per cycle: 48 cycles for three, in which the rows of four registers are loaded, two per cycle.
// The tile registers belong to the thread between `begin_tiles` and `end_tiles`. Written as assembly, so that no other
// function of this file may be compiled to AMX. Included only by csrc/cpu/simd/screen.cpp.
#pragma once

#include "cpu/simd/dot.h"
#include "cpu/simd/f16x.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

extern const DotTable kDotTable;

// Palette 1: every register has 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void begin_tiles() {
  static const TileShapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

static void end_tiles() { asm volatile("tilerelease"); }

// A group's codes [d / 4][16][4], in place, as rows of kScreenUnit: [d / 64][16][64].
static void codes_by_unit(int8_t* codes, int64_t d) {
  for (int64_t at = 0; at < d * kGroupRows; at += kPiece) {
    __m512i row[16];
    float turned[256];
    for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(codes + at + i * 64);
    kDotTable.transpose(reinterpret_cast<const float*>(row), 16, 0, 16, 16, turned, 16);
    memcpy(codes + at, turned, sizeof(turned));
  }
}

// acc[g] = the products of one chunk, unsigned codes of latents with signed ones of tokens.
static inline void tile_sums(const ScreenTile& t, int32_t (*acc)[16][16]) {
  const int64_t group = t.d * 16, line = 64;
  const uint8_t* w = t.w + t.chunk * t.width * 16;
  const int8_t* x = t.x + t.chunk * t.width * 16;
  const char* const* ahead = t.ahead;
  const int64_t panels = t.rows > kScreenRows ? 2 : 1;
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2" ::);
  for (int64_t k = 0; k < t.width; k += kScreenUnit, w += kPiece, x += kPiece) {
    for (int64_t panel = 0; panel < panels; ++panel, ++ahead) {
      if (*ahead == reinterpret_cast<const char*>(t.w)) continue;  // nothing is wanted
      for (int64_t b = 0; b < kPiece; b += 64) __builtin_prefetch(*ahead + b, 0, 2);
    }
    asm volatile(
        "tileloadd (%0,%4,1), %%tmm3\n\t"
        "tileloadd (%1,%4,1), %%tmm4\n\t"
        "tdpbsud %%tmm4, %%tmm3, %%tmm0\n\t"
        "tileloadd (%2,%4,1), %%tmm5\n\t"
        "tdpbsud %%tmm5, %%tmm3, %%tmm1\n\t"
        "tileloadd (%3,%4,1), %%tmm6\n\t"
        "tdpbsud %%tmm6, %%tmm3, %%tmm2" ::"r"(x),
        "r"(w), "r"(w + group), "r"(w + 2 * group), "r"(line)
        : "memory");
  }
  asm volatile(
      "tilestored %%tmm0, (%0,%3,1)\n\t"
      "tilestored %%tmm1, (%1,%3,1)\n\t"
      "tilestored %%tmm2, (%2,%3,1)" ::"r"(acc[0]),
      "r"(acc[1]), "r"(acc[2]), "r"(line)
      : "memory");
}

static void tile_amx(const ScreenTile& t, const ScreenLatents& latents, const ScreenTokens& first,
                     uint64_t* masks, float* products) {
  alignas(64) int32_t acc[kScreenGroups][16][16];
  tile_sums(t, acc);
  const float* w_scale = latents.scale + t.chunk * kScreenBlock;
  __m512 scales[kScreenGroups];
#pragma GCC unroll 3
  for (int g = 0; g < kScreenGroups; ++g) scales[g] = _mm512_loadu_ps(w_scale + g * 16);
  const bool last = (t.chunk + 1) * t.width == t.d;
  const __mmask16 before = t.chunk == 0 ? 0 : 0xffff;
  for (int64_t r = 0; r < t.rows; ++r) {
    const ScreenTokens& tokens = (&first)[r / kScreenRows];
    const int64_t at = r % kScreenRows, own = t.chunk * kScreenRows + at;
    const __m512i excess = _mm512_set1_epi32(128 * tokens.sum[own]);
    uint64_t mask = 0;
#pragma GCC unroll 3
    for (int g = 0; g < kScreenGroups; ++g) {
      float* out = products + r * kScreenBlock + g * 16;
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(acc[g][r]), excess);
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(tokens.scale[own]), scales[g]);
      const __m512 product =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_maskz_loadu_ps(before, out));
      _mm512_storeu_ps(out, product);
      if (last) mask |= passing(product, latents, tokens, at, g);
    }
    if (last) masks[r] = mask;
  }
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
