// The screening tile, and the second stage, for processors with FEAT_DotProd (sdot: Armv8.2 and later).
//
// Algorithm: four tokens' quads are one register, of which sdot picks a lane; four latents' quads another, whose top bits are
// flipped: codes + 128 become codes. 8 tokens x 12 latents at a time keep 24 of 32 registers as accumulators, and the 48
// latents of a block take four turns; fewer tokens take more latents. The float arithmetic is that of the portable tile.
// Bound: the vector pipes, 24 sdot and 3 eor to 5 loads of 16 bytes. Included only by csrc/cpu/simd/screen.cpp.
#pragma once

#include "cpu/simd/f16x.h"
#include "cpu/simd/screen.h"

#if defined(GSF_NEON)

namespace gemmascope_fast {
namespace GSF_TARGET {

// Lets the assembler take sdot: it wants an architecture with the extension. A compiler set to a newer one must not lose that.
#if defined(__ARM_FEATURE_DOTPROD)
#define GSF_SDOT "sdot"
#else
#define GSF_SDOT ".arch armv8.2-a+dotprod\n\tsdot"
#endif

// sum += w . x, four by four bytes per lane, x those of one lane. Not intrinsics, which want a translation unit of their own
// for the processors that have the instruction.
template <int kLane>
static inline void dot_lane(int32x4_t& sum, int8x16_t w, int8x16_t x) {
  asm(GSF_SDOT " %0.4s, %1.16b, %2.4b[%c3]" : "+w"(sum) : "w"(w), "w"(x), "i"(kLane));
}
static inline void dot4(int32x4_t& sum, int8x16_t w, int8x16_t x) {
  asm(GSF_SDOT " %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
}

static inline int8x16_t load_codes(const uint8_t* p) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
}

constexpr int kQuads =
    static_cast<int>(kScreenUnit / 4);  // steps of a tile per unit, 64 bytes each
constexpr int kBlockVectors = static_cast<int>(kScreenBlock / 4);  // four latents each

// The sums of kRows tokens and kWide vectors of latents, the first of them turn * kWide.
template <int kRows, int kWide>
static inline void sum_turn(const ScreenTile& t, int turn, int32x4_t (&acc)[kRows][kWide]) {
  constexpr int kTurns = kBlockVectors / kWide, kLines = kQuads / kTurns;
  const int8_t* x = t.x + t.chunk * t.width * 16;
  const uint8_t* w[kWide];
#pragma GCC unroll 12
  for (int v = 0; v < kWide; ++v) {
    const int64_t at = turn * kWide + v;
    w[v] = t.w + t.chunk * t.width * 16 + at / 4 * t.d * 16 + at % 4 * 16;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r][v] = vdupq_n_s32(0);
  }
  const char* const* ahead = t.ahead;
  for (int64_t k = 0; k < t.width * 16;) {
    const char* piece = *ahead++ + turn * kLines * 64;
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(piece + line * 64, 0, 2);
#pragma GCC unroll 4
      for (int step = 0; step < kTurns; ++step, k += 64) {
        asm volatile(""
                     :
                     :
                     : "memory");  // loads of later steps would push accumulators out of registers
        const int8x16_t x0 = vld1q_s8(x + k), x1 = kRows > 4 ? vld1q_s8(x + k + 16) : x0;
#pragma GCC unroll 12
        for (int v = 0; v < kWide; ++v) {
          const int8x16_t own = load_codes(w[v] + k);
          dot_lane<0>(acc[0][v], own, x0);
          if constexpr (kRows >= 2) dot_lane<1>(acc[1][v], own, x0);
          if constexpr (kRows >= 4) {
            dot_lane<2>(acc[2][v], own, x0);
            dot_lane<3>(acc[3][v], own, x0);
          }
          if constexpr (kRows == 8) {
            dot_lane<0>(acc[4][v], own, x1);
            dot_lane<1>(acc[5][v], own, x1);
            dot_lane<2>(acc[6][v], own, x1);
            dot_lane<3>(acc[7][v], own, x1);
          }
        }
      }
    }
  }
}

// As candidates() of screen_portable.h, four latents at a time.
static inline uint64_t passing(const float* products, const ScreenLatents& latents,
                               const ScreenTokens& tokens, int64_t r) {
  static const uint32_t kBits[4] = {1, 2, 4, 8};
  uint64_t mask = 0;
  for (int j = 0; j < kScreenBlock; j += 4) {
    const F4 margin = vaddq_f32(vmulq_n_f32(vld1q_f32(latents.alpha + j), tokens.a[r]),
                                vmulq_n_f32(vld1q_f32(latents.beta + j), tokens.b[r]));
    const F4 limit = vmulq_n_f32(vld1q_f32(latents.slope + j), tokens.limit[r]);
    const F4 bound = vsubq_f32(vaddq_f32(limit, vld1q_f32(latents.base + j)), margin);
    const uint32x4_t below = vcleq_f32(vld1q_f32(products + j), bound);
    mask |= static_cast<uint64_t>(vaddvq_u32(vbicq_u32(vld1q_u32(kBits), below))) << j;
  }
  return mask;
}

template <int kRows, int kWide>
static inline void tile_turns(const ScreenTile& t, const ScreenLatents& latents,
                              const ScreenTokens& tokens, uint64_t* masks, float* products) {
  const float* w_scale = latents.scale + t.chunk * kScreenBlock;
  const float* x_scale = tokens.scale + t.chunk * kScreenRows;
  for (int turn = 0; turn < kBlockVectors / kWide; ++turn) {
    int32x4_t acc[kRows][kWide];
    sum_turn<kRows, kWide>(t, turn, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 12
      for (int v = 0; v < kWide; ++v) {
        const int j = (turn * kWide + v) * 4;
        float* out = products + r * kScreenBlock + j;
        const F4 scale = vmulq_n_f32(vld1q_f32(w_scale + j), x_scale[r]);
        const F4 part = vmulq_f32(vcvtq_f32_s32(acc[r][v]), scale);
        vst1q_f32(out, t.chunk == 0 ? part : vaddq_f32(vld1q_f32(out), part));
      }
    }
  }
  if ((t.chunk + 1) * t.width < t.d) return;
  for (int r = 0; r < kRows; ++r) {
    masks[r] = passing(products + r * kScreenBlock, latents, tokens, r);
  }
}

static void tile_sdot(const ScreenTile& t, const ScreenLatents& latents, const ScreenTokens& tokens,
                      uint64_t* masks, float* products) {
  if (t.rows == 1) return tile_turns<1, 12>(t, latents, tokens, masks, products);
  if (t.rows <= 2) return tile_turns<2, 6>(t, latents, tokens, masks, products);
  if (t.rows <= 4) return tile_turns<4, 6>(t, latents, tokens, masks, products);
  tile_turns<8, 3>(t, latents, tokens, masks, products);
}

// Several at once, as one dot is a chain; the last one again and again where there are fewer. The next rows of x are read on
// the way.
template <int kPairs>
static inline void fine_pairs(const FinePair* pairs, int64_t count, int64_t d, float* out) {
  const int64_t width = screen_chunk(d);
  FinePair own[kPairs];
  const int8_t* following[kPairs];
  float total[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    own[i] = pairs[i < count ? i : count - 1];
    following[i] = pairs[kPairs + i < count ? kPairs + i : count - 1].x;
    total[i] = 0;
  }
  for (int64_t k = 0, c = 0; k < d; ++c) {
    int32x4_t even[kPairs], odd[kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) even[i] = odd[i] = vdupq_n_s32(0);
    for (const int64_t end = k + width; k < end; k += 64) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        const uint8_t* w = own[i].w + k;
        const int8_t* x = own[i].x + k;
        __builtin_prefetch(following[i] + k);
        dot4(even[i], load_codes(w), vld1q_s8(x));
        dot4(odd[i], load_codes(w + 16), vld1q_s8(x + 16));
        dot4(even[i], load_codes(w + 32), vld1q_s8(x + 32));
        dot4(odd[i], load_codes(w + 48), vld1q_s8(x + 48));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const float scale = own[i].x_scale[c * kScreenRows] * own[i].w_scale[c * kScreenBlock];
      total[i] += static_cast<float>(vaddvq_s32(vaddq_s32(even[i], odd[i]))) * scale;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    if (i < count) out[i] = total[i];
  }
}

static void fine_dots_sdot(const FinePair* pairs, int64_t count, int64_t d, float* out) {
  for (int64_t i = 0; i < count; i += 4) fine_pairs<4>(pairs + i, count - i, d, out + i);
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast

#endif
