// The screening tile in 512-bit registers, and the second stage's dots.
//
// Algorithm: 8 tokens x 48 latents in 24 accumulators for one chunk of d: 3 loads of codes and 8 broadcasts of a token's four
// bytes to 24 products. Bound: the dot-product port (vpdpbusd, one per cycle on Zen 4). Included only by
// csrc/cpu/simd/screen.cpp.
#pragma once

#include "cpu/simd/f16x.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

// sum += w . x, four unsigned by signed bytes per lane. As an intrinsic GCC 12 copies and spills the accumulators (480 instead
// of 880 GOP/s on two cores); it would also need a translation unit with -mavx512vnni.
static inline void dot4(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

// Latents of group g that the bound lets through, at their places of a block's mask.
static inline uint64_t passing(__m512 product, const ScreenLatents& latents,
                               const ScreenTokens& tokens, int64_t r, int g) {
  const __m512 alpha = _mm512_loadu_ps(latents.alpha + g * 16);
  const __m512 beta = _mm512_loadu_ps(latents.beta + g * 16);
  const __m512 slope = _mm512_loadu_ps(latents.slope + g * 16);
  const __m512 base = _mm512_fmadd_ps(_mm512_set1_ps(tokens.limit[r]), slope,
                                      _mm512_loadu_ps(latents.base + g * 16));
  const __m512 margin = _mm512_fmadd_ps(_mm512_set1_ps(tokens.b[r]), beta,
                                        _mm512_mul_ps(_mm512_set1_ps(tokens.a[r]), alpha));
  const __mmask16 above = _mm512_cmp_ps_mask(product, _mm512_sub_ps(base, margin), _CMP_NLE_UQ);
  return static_cast<uint64_t>(above) << (g * 16);
}

template <int kRows>
static inline void tile_rows(const ScreenTile& t, const ScreenLatents& latents,
                             const ScreenTokens& tokens, uint64_t* masks, float* products) {
  const int64_t group = t.d * 16;
  const uint8_t* w = t.w + t.chunk * t.width * 16;
  const int8_t* x = t.x + t.chunk * t.width * 16;
  const char* const* ahead = t.ahead;
  const int32_t* sum = tokens.sum + t.chunk * kScreenRows;
  __m512i acc[kRows][kScreenGroups];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int g = 0; g < kScreenGroups; ++g) acc[r][g] = _mm512_set1_epi32(-128 * sum[r]);
  }
  for (int64_t k = 0; k < t.width; k += kScreenUnit, w += kPiece, x += kPiece) {
    const char* piece = *ahead++;
    for (int64_t b = 0; b < kPiece; b += 64) {
      __builtin_prefetch(piece + b, 0, 2);
      __m512i wv[kScreenGroups];
#pragma GCC unroll 3
      for (int g = 0; g < kScreenGroups; ++g) wv[g] = _mm512_loadu_si512(w + g * group + b);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        memcpy(&four, x + b + r * 4, 4);
        const __m512i xv = _mm512_set1_epi32(four);
#pragma GCC unroll 3
        for (int g = 0; g < kScreenGroups; ++g) dot4(acc[r][g], wv[g], xv);
      }
    }
  }
  const float* w_scale = latents.scale + t.chunk * kScreenBlock;
  const float* x_scale = tokens.scale + t.chunk * kScreenRows;
  const bool last = (t.chunk + 1) * t.width == t.d;
  const __mmask16 before = t.chunk == 0 ? 0 : 0xffff;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    uint64_t mask = 0;
#pragma GCC unroll 3
    for (int g = 0; g < kScreenGroups; ++g) {
      float* out = products + r * kScreenBlock + g * 16;
      const __m512 scale =
          _mm512_mul_ps(_mm512_set1_ps(x_scale[r]), _mm512_loadu_ps(w_scale + g * 16));
      const __m512 product =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][g]), scale, _mm512_maskz_loadu_ps(before, out));
      _mm512_storeu_ps(out, product);
      if (last) mask |= passing(product, latents, tokens, r, g);
    }
    if (last) masks[r] = mask;
  }
}

static void tile_vnni(const ScreenTile& t, const ScreenLatents& latents, const ScreenTokens& tokens,
                      uint64_t* masks, float* products) {
  if (t.rows == 1) return tile_rows<1>(t, latents, tokens, masks, products);
  if (t.rows <= 2) return tile_rows<2>(t, latents, tokens, masks, products);
  if (t.rows <= 4) return tile_rows<4>(t, latents, tokens, masks, products);
  tile_rows<8>(t, latents, tokens, masks, products);
}

// Several at once, as one dot is a chain; the last one again and again where there are fewer. The next rows of x are read on
// the way. The 128 too many are taken off lane by lane, before anything is rounded: all that rounding sees is p and f.
template <int kPairs>
static inline void fine_pairs(const FinePair* pairs, int64_t count, int64_t next, int64_t d,
                              float* out) {
  const int64_t width = screen_chunk(d);
  FinePair own[kPairs];
  const int8_t* following[kPairs];
  __m512 acc[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    own[i] = pairs[i < count ? i : count - 1];
    following[i] = pairs[next + i < count ? next + i : count - 1].x;
    acc[i] = _mm512_setzero_ps();
  }
  const __m512i offset = _mm512_set1_epi8(-128);
  for (int64_t k = 0, c = 0; k < d; ++c) {
    __m512i sum[kPairs], excess[kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) sum[i] = excess[i] = _mm512_setzero_si512();
    for (const int64_t end = k + width; k < end; k += 64) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        __builtin_prefetch(following[i] + k);
        const __m512i x = _mm512_loadu_si512(own[i].x + k);
        dot4(sum[i], _mm512_loadu_si512(own[i].w + k), x);
        dot4(excess[i], offset, x);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const float scale = own[i].x_scale[c * kScreenRows] * own[i].w_scale[c * kScreenBlock];
      const __m512 part = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i], excess[i]));
      acc[i] = _mm512_fmadd_ps(part, _mm512_set1_ps(scale), acc[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    const float sum = _mm512_reduce_add_ps(acc[i]);
    if (i < count) out[i] = sum;
  }
}

static void fine_dots_vnni(const FinePair* pairs, int64_t count, int64_t d, float* out) {
  for (int64_t i = 0; i < count; i += 4) {
    fine_pairs<4>(pairs + i, count - i, 4, d, out + i);
  }
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
