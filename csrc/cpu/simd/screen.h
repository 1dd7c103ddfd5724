// The int8 product that screens entries before the float32 dot decides, one table of functions per SIMD target.
//
// A *group* is 16 rows (tokens or latents) quantised together: codes [d / 4][16][4], four consecutive elements of a row side
// by side, as the dot-product instructions take them. A *block* is kScreenGroups groups of latents.
#pragma once

#include <stdint.h>

#include "cpu/simd_target.h"

namespace gemmascope_fast {

constexpr int64_t kGroupRows = 16;
constexpr int64_t kScreenGroups = 3;  // of latents in one tile: with 8 tokens, 24 accumulators
constexpr int64_t kScreenBlock = kScreenGroups * kGroupRows;
constexpr int64_t kScreenRows = 8;   // tokens of one tile
constexpr int64_t kScreenUnit = 64;  // d is padded to a multiple of it

// What is known of 16 quantised rows. H is the block Hadamard transform times sqrt(block), y = inverse * H(row - subtract),
// p = round(y) the codes. All but `inverse` are sums as computed, in float32.
struct QuantisedRows {
  float inverse[kGroupRows];        // 127 / max |H(row - subtract)|, or 1 for a row of zeros
  float largest[kGroupRows];        // max |H(row - subtract)|
  float y_squared[kGroupRows];      // |y|^2
  float p_squared[kGroupRows];      // |p|^2
  float error_squared[kGroupRows];  // |y - p|^2
  float raw_squared[kGroupRows];    // |row|^2
  float dot[kGroupRows];            // <row, with>, or 0
  float fine_squared[kGroupRows];   // |y - p - f / kFine|^2, f the fine codes
  int32_t sum[kGroupRows];          // sum of the codes
  int32_t fine_sum[kGroupRows];     // sum of the fine codes
};

// A fine code is round(kFine (y - p)): what the code left over, in int8 again.
constexpr float kFine = 254.0f;

// Per latent of a block and per token of a tile: entry (i, j) is a candidate unless
//   sum_k p q  <=  inverse_i (base_j + limit_i slope_j) - a_i alpha_j - b_i beta_j
struct ScreenLatents {
  float base[kScreenBlock], slope[kScreenBlock], alpha[kScreenBlock], beta[kScreenBlock];
};
struct ScreenTokens {
  float inverse[kScreenRows], a[kScreenRows], b[kScreenRows], limit[kScreenRows];
  int32_t sum[kScreenRows];  // of the codes
};

// Memory that later code wants, read on the way: a byte in each of d / 4 places `step` bytes apart.
struct ReadAhead {
  const char* at;
  int64_t step;
};

struct ScreenTable {
  // True when the processor multiplies int8 at several times its float32 rate.
  bool fast;

  // Quantises 16 rows given transposed, rows[k * 16 + r], k < count; d >= count is a multiple of kScreenUnit and what is
  // missing is zero. subtract and with [count] may be null. work: d * 16 floats; codes, and fine or null: d * 16 bytes.
  void (*quantise)(const float* rows, int64_t count, int64_t d, const float* subtract,
                   const float* with, float* work, int8_t* codes, int8_t* fine, QuantisedRows* out);

  // masks[r] bit j: entry (token r, latent j) of the block is a candidate; products[r * kScreenBlock + j] is its q . p. w: kScreenGroups groups of latents, each d * 16
  // bytes, codes + 128; x: a group of tokens, shifted to the tile's first row (4 bytes a row).
  void (*tile)(const uint8_t* w, const int8_t* x, int64_t rows, int64_t d,
               const ScreenLatents& latents, const ScreenTokens& tokens, ReadAhead ahead,
               uint64_t* masks, int32_t* products);

  // out[i] = sum_k w[i][k] x[i][k], i < count: codes + 128 against fine codes.
  void (*fine_dots)(const uint8_t* const* w, const int8_t* const* x, int64_t count, int64_t d,
                    int32_t* out);
};

const ScreenTable& screen_table(SimdTarget target);

// Elements that one Hadamard transform mixes: the largest power of two up to 256 that divides d, a multiple of kScreenUnit.
inline int64_t hadamard_block(int64_t d) {
  int64_t block = kScreenUnit;
  while (block < 256 && d % (2 * block) == 0) block *= 2;
  return block;
}

}  // namespace gemmascope_fast
