// The int8 product that screens entries before the float32 dot decides, one table of functions per SIMD target.
//
// A *group* is 16 rows (tokens or latents) quantised together: codes [d / 4][16][4], four consecutive elements of a row side
// by side, as the dot-product instructions take them. A *block* is kScreenGroups groups of latents.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <new>
#include <vector>

#include "cpu/simd_target.h"

namespace gemmascope_fast {

constexpr int64_t kGroupRows = 16;
constexpr int64_t kScreenGroups = 3;  // of latents in one tile: with 8 tokens, 24 accumulators
constexpr int64_t kScreenBlock = kScreenGroups * kGroupRows;
constexpr int64_t kScreenRows = 8;   // tokens of one tile
constexpr int64_t kScreenUnit = 64;  // d is padded to a multiple of it

// Codes, from the start of a cache line: a row of 64 that lies across two takes AMX four times as long to load.
template <class T>
struct CacheLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  CacheLines() = default;
  template <class U>
  explicit CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  friend bool operator==(const CacheLines&, const CacheLines&) { return true; }
  friend bool operator!=(const CacheLines&, const CacheLines&) { return false; }
};
template <class T>
using Codes = std::vector<T, CacheLines<T>>;

// What is known of 16 quantised rows. H is the block Hadamard transform times sqrt(block). A *chunk* is whole blocks of H with
// a scale of their own: y = H(row - subtract) / scale, p = round(y) the codes. All but `scale` are sums as computed, in float32.
struct QuantisedRows {
  float largest[kGroupRows];      // max |H(row - subtract)|
  float raw_squared[kGroupRows];  // |row|^2
  float dot[kGroupRows];          // <row, with>, or 0
};
struct QuantisedChunk {
  float scale
      [kGroupRows];  // max |H(row - subtract)| of the chunk / largest code, or 1 for a row of zeros
  float y_squared[kGroupRows];      // |y|^2
  float p_squared[kGroupRows];      // |p|^2
  float error_squared[kGroupRows];  // |y - p|^2
  float fine_squared[kGroupRows];   // |y - p - f / fine_unit|^2, f the fine codes
  int32_t sum[kGroupRows];          // sum of the codes
};

// Fine codes to a code: round(fine_unit (y - p)) is what the code left over, no larger than a code again.
constexpr float fine_unit(float largest) { return 2 * largest; }

// Per latent of a block and per token of a tile: entry (i, j) is a candidate unless
//   P = sum over chunks of scale_i scale_j sum_k p q  <=  base_j + limit_i slope_j - a_i alpha_j - b_i beta_j
struct ScreenLatents {
  float base[kScreenBlock], slope[kScreenBlock], alpha[kScreenBlock], beta[kScreenBlock];
  const float* scale;  // [chunks][kScreenBlock]
};
struct ScreenTokens {
  float a[kScreenRows], b[kScreenRows], limit[kScreenRows];
  const float* scale;  // [chunks][kScreenRows]
  const int32_t* sum;  // the same: of the codes
};

// Part of a tile: one chunk of its codes. w: kScreenGroups groups of latents, each d * 16 bytes, codes + 128; x: a group of
// tokens, shifted to the tile's first row (4 bytes a row), or whole where a tile takes whole groups.
struct ScreenTile {
  const uint8_t* w;
  const int8_t* x;
  int64_t rows, d, chunk, width;  // elements [chunk * width, (chunk + 1) * width) of d
  // Memory that later code wants, read on the way: kPiece bytes for every kScreenUnit elements and kScreenRows tokens.
  const char* const* ahead;
};
constexpr int64_t kPiece = 1024;

// One entry of the second stage: rows of codes, and what scales them.
struct FinePair {
  const uint8_t* w;      // codes + 128
  const float* w_scale;  // one per chunk, kScreenBlock apart
  const int8_t* x;       // fine codes
  const float* x_scale;  // one per chunk, kScreenRows apart
};

// The largest code of a latent: the same everywhere, as packed codes are kept.
constexpr float kLatentCode = 127.0f;

struct ScreenTable {
  // True when the processor multiplies int8 faster than float32.
  bool fast;

  // Tokens from which screening pays where the latents' codes are made for them.
  int64_t tokens;

  // The largest code of a token: 127, or what the tile's sums can hold.
  float token_code;

  // Quantises 16 rows given transposed, rows[k * 16 + r], k < count; d >= count is a multiple of kScreenUnit and what is
  // missing is zero. No code is above `largest`. subtract and with [count] may be null. work: d * 16 floats; codes, and fine
  // or null: d * 16 bytes;
  // chunks: d / screen_chunk(d).
  void (*quantise)(const float* rows, int64_t count, int64_t d, float largest,
                   const float* subtract, const float* with, float* work, int8_t* codes,
                   int8_t* fine, QuantisedRows* out, QuantisedChunk* chunks);

  // Adds a chunk to products[r * kScreenBlock + j], the P of token r and latent j, which the first chunk starts. The last
  // one sets masks[r] bit j: the entry is a candidate. `tokens`: of the first kScreenRows tokens; those of the next follow.
  void (*tile)(const ScreenTile& tile, const ScreenLatents& latents, const ScreenTokens& tokens,
               uint64_t* masks, float* products);

  // out[i] = sum over chunks of w_scale x_scale sum_k p g, i < count: codes against fine codes.
  void (*fine_dots)(const FinePair* pairs, int64_t count, int64_t d, float* out);

  // Most tokens of a tile: kScreenRows or kGroupRows.
  int64_t rows = kScreenRows;

  // Lays the codes of a group of tokens out for `tile`, in place; null where they are as `quantise` writes them.
  void (*arrange)(int8_t* codes, int64_t d) = nullptr;

  // Called by a thread before and after its tiles; null where nothing is to be done.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;

  // What multiplies kScreenRows tokens or fewer; null: this.
  const ScreenTable* few = nullptr;

  // True where a block's product is over before the rows of W_enc that its candidates want can be read meanwhile.
  bool outruns_memory = false;
};

const ScreenTable& screen_table(SimdTarget target);

// Elements that one Hadamard transform mixes: the largest power of two up to 256 that divides d, a multiple of kScreenUnit.
inline int64_t hadamard_block(int64_t d) {
  int64_t block = kScreenUnit;
  while (block < 256 && d % (2 * block) == 0) block *= 2;
  return block;
}

// Elements that share a scale: the fewest whole transforms that are at least 256 and divide d. Few, because the largest of
// them sets the scale, and because a tile's part of a chunk then stays in L1; not fewer, because each costs the tile as much
// as 8 elements.
inline int64_t screen_chunk(int64_t d) {
  const int64_t block = hadamard_block(d);
  int64_t chunk = block;
  while (chunk < d && (chunk < 256 || d % chunk != 0)) chunk += block;
  return chunk;
}

}  // namespace gemmascope_fast
