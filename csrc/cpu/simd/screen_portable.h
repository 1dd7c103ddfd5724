// The screening tile and the second stage's dots in plain C++, for processors without a faster form of them. Included only by
// csrc/cpu/simd/screen.cpp.
#pragma once

#include "cpu/simd/f16x.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

// Latents the bound lets through, as one bit each. products[j]: P of token r.
static inline uint64_t candidates(const float* products, const ScreenLatents& latents,
                                  const ScreenTokens& tokens, int64_t r) {
  uint64_t mask = 0;
  for (int j = 0; j < kScreenBlock; ++j) {
    const float margin = tokens.a[r] * latents.alpha[j] + tokens.b[r] * latents.beta[j];
    const float bound = tokens.limit[r] * latents.slope[j] + latents.base[j] - margin;
    mask |= static_cast<uint64_t>(!(products[j] <= bound)) << j;
  }
  return mask;
}

static void tile(const ScreenTile& t, const ScreenLatents& latents, const ScreenTokens& tokens,
                 uint64_t* masks, float* products) {
  const int64_t first = t.chunk * t.width / 4, last = first + t.width / 4;
  const float* w_scale = latents.scale + t.chunk * kScreenBlock;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float x_scale = tokens.scale[t.chunk * kScreenRows + r];
    int32_t sums[kScreenBlock];
    for (int j = 0; j < kScreenBlock; ++j) sums[j] = -128 * tokens.sum[t.chunk * kScreenRows + r];
    for (int64_t g = 0; g < kScreenGroups; ++g) {
      for (int64_t k = first; k < last; ++k) {
        const uint8_t* codes = t.w + (g * t.d / 4 + k) * 64;
        const int8_t* own = t.x + k * 64 + r * 4;
        for (int j = 0; j < 16; ++j) {
          for (int e = 0; e < 4; ++e) sums[g * 16 + j] += int{codes[j * 4 + e]} * int{own[e]};
        }
      }
    }
    float* out = products + r * kScreenBlock;
    for (int j = 0; j < kScreenBlock; ++j) {
      const float part = static_cast<float>(sums[j]) * (x_scale * w_scale[j]);
      out[j] = t.chunk == 0 ? part : out[j] + part;
    }
    if ((t.chunk + 1) * t.width == t.d) masks[r] = candidates(out, latents, tokens, r);
  }
}

static void fine_dots(const FinePair* pairs, int64_t count, int64_t d, float* out) {
  const int64_t width = screen_chunk(d);
  for (int64_t i = 0; i < count; ++i) {
    const FinePair& pair = pairs[i];
    out[i] = 0;
    for (int64_t c = 0; c < d / width; ++c) {
      int32_t sum = 0;
      for (int64_t k = c * width; k < (c + 1) * width; ++k) {
        sum += (int{pair.w[k]} - 128) * int{pair.x[k]};
      }
      const float scale = pair.x_scale[c * kScreenRows] * pair.w_scale[c * kScreenBlock];
      out[i] += static_cast<float>(sum) * scale;
    }
  }
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
