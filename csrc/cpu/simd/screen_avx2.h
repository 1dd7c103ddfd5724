// The screening tile in 256-bit registers, and the second stage's dots, by one of
//
//   Vex    vpdpbusd of AVX-VNNI: processors without AVX-512, Intel's since Alder Lake
//   Evex   the same of AVX-512, where the target avx2_vnni was asked for by name
//   Pairs  AVX2 alone: vpmaddubsw adds two products in int16, which holds them if a token's codes end at 63
//
// Algorithm: passes of 4 tokens x 24 latents for one chunk of d, whose 12 accumulators, 3 registers of latents' codes and one
// of a token's are all there are (Pairs: 2 tokens). Eight tokens by 48 latents are four passes over codes in L1, or eight.
// Bound: the multipliers, two a cycle: 32 products an instruction; Pairs takes two for them, float32 four. Included only by
// csrc/cpu/simd/screen.cpp.
#pragma once

#include "cpu/simd/f16x.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

static inline __m256i load_codes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// How products are summed. dot4: sum += w . x, four unsigned by signed bytes per lane.
// vpdpbusd as assembly for the reasons of screen_avx512.h; without a prefix an assembler takes the encoding of AVX-512.
struct Evex {
  static constexpr int kRows = 4;
  static inline void dot4(__m256i& sum, __m256i w, __m256i x) {
    asm("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  }
};

#if GSF_AVX_VNNI
struct Vex {
  static constexpr int kRows = 4;
  static inline void dot4(__m256i& sum, __m256i w, __m256i x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  }
};
#endif

struct Pairs {
  static constexpr int kRows = 2;
  static constexpr float kCode = 63;  // 2 * 255 * 63 < 2^15
  static inline void dot4(__m256i& sum, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w, x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

constexpr int kVectorLatents = 8;
constexpr int kVectors = 3;  // of a pass: half a block

// Adds a chunk's sums of 8 latents to their products; after the last chunk, the latents that the bound lets through.
static inline unsigned finish(const ScreenTile& t, const ScreenLatents& latents,
                              const ScreenTokens& tokens, int token, int latent, __m256i sums,
                              float* products) {
  float* out = products + token * kScreenBlock + latent;
  const float x_scale = tokens.scale[t.chunk * kScreenRows + token];
  const float* w_scale = latents.scale + t.chunk * kScreenBlock + latent;
  const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(x_scale), _mm256_loadu_ps(w_scale));
  const __m256 before = t.chunk == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(out);
  const __m256 product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, before);
  _mm256_storeu_ps(out, product);
  if ((t.chunk + 1) * t.width < t.d) return 0;
  const __m256 base =
      _mm256_fmadd_ps(_mm256_set1_ps(tokens.limit[token]), _mm256_loadu_ps(latents.slope + latent),
                      _mm256_loadu_ps(latents.base + latent));
  const __m256 error =
      _mm256_mul_ps(_mm256_set1_ps(tokens.a[token]), _mm256_loadu_ps(latents.alpha + latent));
  const __m256 margin = _mm256_fmadd_ps(_mm256_set1_ps(tokens.b[token]),
                                        _mm256_loadu_ps(latents.beta + latent), error);
  const __m256 above = _mm256_cmp_ps(product, _mm256_sub_ps(base, margin), _CMP_NLE_UQ);
  return static_cast<unsigned>(_mm256_movemask_ps(above));
}

// The tile's tokens [row, row + kRows) and its latents' vectors [first, first + kCount). Of the memory to read ahead, every
// kPasses-th line, from line `pass` on.
template <class Sum, int kRows, int kCount, int kPasses>
static inline void tile_pass(const ScreenTile& t, const ScreenLatents& latents,
                             const ScreenTokens& tokens, int row, int first, int pass,
                             uint64_t* masks, float* products) {
  const int64_t start = t.chunk * t.width * kGroupRows;
  const int8_t* x = t.x + start + row * 4;
  const uint8_t* w[kCount];
  const char* const* ahead = t.ahead;
  const int32_t* sum = tokens.sum + t.chunk * kScreenRows + row;
  __m256i acc[kRows][kCount];
#pragma GCC unroll 6
  for (int v = 0; v < kCount; ++v) {
    const int at = first + v;
    w[v] = t.w + at / 2 * t.d * kGroupRows + at % 2 * 32 + start;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) acc[r][v] = _mm256_set1_epi32(-128 * sum[r]);
  }
  for (int64_t k = 0; k < t.width * kGroupRows; k += kPiece) {
    const char* piece = *ahead++ + pass * 64;
    for (int64_t line = k; line < k + kPiece; line += kPasses * 64, piece += kPasses * 64) {
      __builtin_prefetch(piece, 0, 2);
#pragma GCC unroll 4
      for (int64_t b = line; b < line + kPasses * 64; b += 64) {
        __m256i wv[kCount];
#pragma GCC unroll 6
        for (int v = 0; v < kCount; ++v) wv[v] = load_codes(w[v] + b);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          int32_t four;
          memcpy(&four, x + b + r * 4, 4);
          const __m256i xv = _mm256_set1_epi32(four);
#pragma GCC unroll 6
          for (int v = 0; v < kCount; ++v) Sum::dot4(acc[r][v], wv[v], xv);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int v = 0; v < kCount; ++v) {
      const int latent = (first + v) * kVectorLatents;
      const unsigned above = finish(t, latents, tokens, row + r, latent, acc[r][v], products);
      masks[row + r] |= static_cast<uint64_t>(above) << latent;
    }
  }
}

// Up to kTokens tokens of the tile.
template <class Sum, int kTokens>
static inline void tile_tokens(const ScreenTile& t, const ScreenLatents& latents,
                               const ScreenTokens& tokens, uint64_t* masks, float* products) {
  constexpr int kRows = Sum::kRows, kPasses = 2 * kTokens / kRows;
  for (int i = 0; i < kTokens; ++i) masks[i] = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    tile_pass<Sum, kRows, kVectors, kPasses>(t, latents, tokens, pass / 2 * kRows,
                                             pass % 2 * kVectors, pass, masks, products);
  }
}

template <class Sum>
static void tile(const ScreenTile& t, const ScreenLatents& latents, const ScreenTokens& tokens,
                 uint64_t* masks, float* products) {
  if (t.rows == 1) {
    masks[0] = 0;
    return tile_pass<Sum, 1, 2 * kVectors, 1>(t, latents, tokens, 0, 0, 0, masks, products);
  }
  if (t.rows <= 4) return tile_tokens<Sum, 4>(t, latents, tokens, masks, products);
  tile_tokens<Sum, 8>(t, latents, tokens, masks, products);
}

// Several at once, as in screen_avx512.h.
template <class Sum>
static inline void fine_pairs(const FinePair* pairs, int64_t count, int64_t d, float* out) {
  constexpr int kPairs = 4;
  const int64_t width = screen_chunk(d);
  FinePair own[kPairs];
  const int8_t* following[kPairs];
  __m256 acc[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    own[i] = pairs[i < count ? i : count - 1];
    following[i] = pairs[kPairs + i < count ? kPairs + i : count - 1].x;
    acc[i] = _mm256_setzero_ps();
  }
  const __m256i offset = _mm256_set1_epi8(-128);
  for (int64_t k = 0, c = 0; k < d; ++c) {
    __m256i sum[kPairs], excess[kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) sum[i] = excess[i] = _mm256_setzero_si256();
    for (const int64_t end = k + width; k < end; k += 32) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        __builtin_prefetch(following[i] + k);
        const __m256i x = load_codes(own[i].x + k);
        Sum::dot4(sum[i], load_codes(own[i].w + k), x);
        Sum::dot4(excess[i], offset, x);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const float scale = own[i].x_scale[c * kScreenRows] * own[i].w_scale[c * kScreenBlock];
      const __m256 part = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[i], excess[i]));
      acc[i] = _mm256_fmadd_ps(part, _mm256_set1_ps(scale), acc[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    const float sum = reduce({acc[i], _mm256_setzero_ps()});
    if (i < count) out[i] = sum;
  }
}

template <class Sum>
static void fine_dots(const FinePair* pairs, int64_t count, int64_t d, float* out) {
  for (int64_t i = 0; i < count; i += 4) fine_pairs<Sum>(pairs + i, count - i, d, out + i);
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
