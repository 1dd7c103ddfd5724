// The tile that multiplies int8 codes and compares the products with a bound per entry.
//
//   q . p = sum_k q_k p_k, exact in int32;  candidate unless  q . p <= inverse_i (base_j + limit_i slope_j) - a_i alpha_j - b_i beta_j
//
// Algorithm: the tile keeps 8 tokens x 48 latents in 24 accumulators; the codes come from quantise.h.
// Bound: the dot-product port (vpdpbusd, one per cycle on Zen 4, 93 % of it reached at d = 1152).
// GCC 12 takes the deliberately undefined operands of its own AVX-512 intrinsics for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/simd/screen.h"

#include "cpu/simd/quantise.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

// Latents the bound lets through, as one bit each. products[j] = q . p of token r.
static inline uint64_t candidates(const float (&products)[kScreenBlock],
                                  const ScreenLatents& latents, const ScreenTokens& tokens, int r) {
  uint64_t mask = 0;
  for (int j = 0; j < kScreenBlock; ++j) {
    const float margin = tokens.a[r] * latents.alpha[j] + tokens.b[r] * latents.beta[j];
    const float base = tokens.limit[r] * latents.slope[j] + latents.base[j];
    const float bound = tokens.inverse[r] * base - margin;
    mask |= static_cast<uint64_t>(!(products[j] <= bound)) << j;
  }
  return mask;
}

static void tile(const uint8_t* w, const int8_t* x, int64_t rows, int64_t d,
                 const ScreenLatents& latents, const ScreenTokens& tokens, ReadAhead,
                 uint64_t* masks, int32_t* products) {
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* sums = products + r * kScreenBlock;
    for (int j = 0; j < kScreenBlock; ++j) sums[j] = -128 * tokens.sum[r];
    for (int64_t g = 0; g < kScreenGroups; ++g) {
      for (int64_t k = 0; k < d / 4; ++k) {
        const uint8_t* codes = w + (g * d / 4 + k) * 64;
        const int8_t* own = x + k * 64 + r * 4;
        for (int j = 0; j < 16; ++j) {
          for (int e = 0; e < 4; ++e) sums[g * 16 + j] += int{codes[j * 4 + e]} * int{own[e]};
        }
      }
    }
    float wide[kScreenBlock];
    for (int j = 0; j < kScreenBlock; ++j) wide[j] = static_cast<float>(sums[j]);
    masks[r] = candidates(wide, latents, tokens, static_cast<int>(r));
  }
}

static void fine_dots(const uint8_t* const* w, const int8_t* const* x, int64_t count, int64_t d,
                      int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < d; ++k) sum += int{w[i][k]} * int{x[i][k]};
    out[i] = sum;
  }
}

#if defined(__AVX512F__)

// sum += w . x, four unsigned by signed bytes per lane. As an intrinsic GCC 12 copies and spills the accumulators (480 instead
// of 880 GOP/s on two cores); it would also need a translation unit with -mavx512vnni.
static inline void dot4(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

template <int kRows>
static inline void tile_rows(const uint8_t* w, const int8_t* x, int64_t d,
                             const ScreenLatents& latents, const ScreenTokens& tokens,
                             ReadAhead ahead, uint64_t* masks, int32_t* products) {
  __m512i acc[kRows][kScreenGroups];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int g = 0; g < kScreenGroups; ++g) acc[r][g] = _mm512_set1_epi32(-128 * tokens.sum[r]);
  }
  for (int64_t k = 0; k < d * 16; k += 64) {
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.step;
    __m512i wv[kScreenGroups];
#pragma GCC unroll 3
    for (int g = 0; g < kScreenGroups; ++g) wv[g] = _mm512_loadu_si512(w + g * d * 16 + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      memcpy(&four, x + k + r * 4, 4);
      const __m512i xv = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int g = 0; g < kScreenGroups; ++g) dot4(acc[r][g], wv[g], xv);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    uint64_t mask = 0;
#pragma GCC unroll 3
    for (int g = 0; g < kScreenGroups; ++g) {
      const __m512 alpha = _mm512_loadu_ps(latents.alpha + g * 16);
      const __m512 beta = _mm512_loadu_ps(latents.beta + g * 16);
      const __m512 slope = _mm512_loadu_ps(latents.slope + g * 16);
      const __m512 base = _mm512_fmadd_ps(_mm512_set1_ps(tokens.limit[r]), slope,
                                          _mm512_loadu_ps(latents.base + g * 16));
      const __m512 margin = _mm512_fmadd_ps(_mm512_set1_ps(tokens.b[r]), beta,
                                            _mm512_mul_ps(_mm512_set1_ps(tokens.a[r]), alpha));
      const __m512 bound = _mm512_fmsub_ps(_mm512_set1_ps(tokens.inverse[r]), base, margin);
      const __mmask16 above = _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(acc[r][g]), bound, _CMP_NLE_UQ);
      mask |= static_cast<uint64_t>(above) << (g * 16);
      _mm512_storeu_si512(products + r * kScreenBlock + g * 16, acc[r][g]);
    }
    masks[r] = mask;
  }
}

static void tile_vnni(const uint8_t* w, const int8_t* x, int64_t rows, int64_t d,
                      const ScreenLatents& latents, const ScreenTokens& tokens, ReadAhead ahead,
                      uint64_t* masks, int32_t* products) {
  if (rows == 1) return tile_rows<1>(w, x, d, latents, tokens, ahead, masks, products);
  if (rows <= 2) return tile_rows<2>(w, x, d, latents, tokens, ahead, masks, products);
  if (rows <= 4) return tile_rows<4>(w, x, d, latents, tokens, ahead, masks, products);
  tile_rows<8>(w, x, d, latents, tokens, ahead, masks, products);
}

// The last pair again and again where there are fewer than kPairs.
template <int kPairs>
static inline void fine_pairs(const uint8_t* const* w, const int8_t* const* x, int64_t count,
                              int64_t d, int32_t* out) {
  const uint8_t* ws[kPairs];
  const int8_t* xs[kPairs];
  __m512i acc[kPairs];
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    ws[i] = w[i < count ? i : count - 1];
    xs[i] = x[i < count ? i : count - 1];
    acc[i] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < d; k += 64) {
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      dot4(acc[i], _mm512_loadu_si512(ws[i] + k), _mm512_loadu_si512(xs[i] + k));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    const int32_t sum = _mm512_reduce_add_epi32(acc[i]);
    if (i < count) out[i] = sum;
  }
}

static void fine_dots_vnni(const uint8_t* const* w, const int8_t* const* x, int64_t count,
                           int64_t d, int32_t* out) {
  for (int64_t i = 0; i < count; i += 4) fine_pairs<4>(w + i, x + i, count - i, d, out + i);
}

extern const ScreenTable kVnniScreenTable;
const ScreenTable kVnniScreenTable = {true, quantise, tile_vnni, fine_dots_vnni};

#endif

extern const ScreenTable kScreenTable;
const ScreenTable kScreenTable = {false, quantise, tile, fine_dots};

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
