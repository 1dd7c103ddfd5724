// Which entries of x @ W_enc can pass a limit at all: int8 products with a rigorous margin.
//
//   x_i . w_j = c . w_j + (1 / B) X . W,   X = H(x_i - c) = S q + dX,   W = H w_j = R p + dW
//   |X . W - (S q) . (R p)|  <=  |S q| |dW| + |dX| |W| + rounding
//
// c is a centre, H a Hadamard transform of blocks of B elements, which spreads dimensions that are much larger than the
// rest, q and p int8 codes. S and R scale them, one number per row and chunk of d (screen_chunk): the largest of 256 elements
// is a fifth below that of 5,376, and so are dX and dW. Since X . W - (S q) . (R p) = (S q) . dW + dX . W, the bound is that
// of Cauchy and Schwarz, and holds whatever S and R are.
// The rounding terms cover the transform, the norms, c . w_j, the sum over chunks, the bound's own arithmetic and the
// canonical float32 dot itself, so an entry that is not a candidate cannot pass: nothing is missed, on any data. A second
// stage adds the product of R p with int8 codes of what q left over: the error of x is gone then.
// Rows that are not finite or out of range (2^-40 .. 2^40) have every entry as a candidate.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/padded_rows.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {

// Limits of an encoder's entries: those with dot + bias[j] <= limit do not matter.
struct EncodeLimits {
  const float* bias;
  const float*
      latent;  // limit of latent j, or null: `row` has one per token, >= 0, infinite where nothing is wanted
  std::function<float(int64_t row)> row;
  // With limits of rows that rise on the way. Where this is set, screened entries that may pass are held back until the limits
  // have risen, and it is told at once of what their codes say: a value, and its standard deviation from pre, about. The caller
  // proves what it makes of that.
  std::function<void(int64_t row, float value, float deviation)> expect = nullptr;
};

// A latent's share of the bounds.
struct LatentStats {
  float size;   // >= |W|; infinite: every entry is a candidate
  float error;  // >= |dW|, transform's rounding included
  float dot;    // c . w
};

// Codes + 128, stats and scales [chunks][kScreenBlock] of a block of kScreenBlock latents.
struct LatentBlock {
  const uint8_t* codes;
  const LatentStats* stats;
  const float* scales;
};

// A token in the second stage: with its fine codes f, dX' = X - S (q + f / fine_unit) is all that the codes leave.
struct FineToken {
  float a;  // >= |S (q + f / fine_unit)|
  float b;  // >= |dX'|, rounding included
};

// The tokens' side: codes and bounds of all rows of x, made once per call.
class ScreenedTokens {
 public:
  // x: n rows of padded float32, x_stride apart; center [d_in] or null.
  ScreenedTokens(const float* x, int64_t x_stride, int64_t n, int64_t d_in, const float* center);

  // Multiplies the codes, which lie as its tile wants them.
  const ScreenTable& table() const { return table_; }
  int64_t d() const { return d_; }
  const float* center() const { return center_; }
  // The tile of rows [row, row + kScreenRows), row a multiple of kScreenRows.
  const int8_t* codes(int64_t row) const {
    return codes_.data() + row / kGroupRows * kGroupRows * d_ + row % kGroupRows * 4;
  }
  const ScreenTokens& tokens(int64_t row) const {
    return tokens_[static_cast<size_t>(row / kScreenRows)];
  }
  const FineToken& fine(int64_t row) const { return fine_[static_cast<size_t>(row)]; }
  // The token's half of the second stage's product.
  FinePair fine_pair(int64_t row) const {
    const int64_t at = row / kScreenRows * kScreenRows * chunks_ + row % kScreenRows;
    return {nullptr, nullptr, fine_codes_.data() + row * d_, scales_.data() + at};
  }

 private:
  void quantise(int64_t row, int64_t count, float* lanes, float* work, int8_t* fine,
                QuantisedChunk* chunks);

  const ScreenTable& table_;
  const float* x_;
  int64_t x_stride_, d_in_, d_, chunks_;
  const float* center_;
  double center_norm_ = 0;
  Codes<int8_t> codes_, fine_codes_;  // the fine ones a contiguous row per token
  std::vector<float> scales_;         // [tiles][chunks][kScreenRows]
  std::vector<int32_t> sums_;         // the same
  std::vector<ScreenTokens> tokens_;
  std::vector<FineToken> fine_;
};

// What screening knows of entry (i, j): |X . W - product| <= margin.
struct ScreenBound {
  double product, margin;
};

// After the tile, i row r of its tokens: as the tile compares.
inline ScreenBound coarse_bound(const ScreenTokens& tokens, int64_t r, const ScreenLatents& latents,
                                int64_t j, float product) {
  return {product, static_cast<double>(tokens.a[r]) * latents.alpha[j] +
                       static_cast<double>(tokens.b[r]) * latents.beta[j]};
}

// After the second stage: fine = what fine_dots gives / fine_unit.
inline ScreenBound fine_bound(const FineToken& token, const ScreenLatents& latents, int64_t j,
                              float product, double fine) {
  return {product + fine, static_cast<double>(token.a) * latents.alpha[j] +
                              static_cast<double>(token.b) * latents.beta[j]};
}

// False where the entry cannot pass its limit.
inline bool may_pass(const ScreenBound& bound, float limit, const ScreenLatents& latents,
                     int64_t j) {
  const double base = latents.base[j] + static_cast<double>(limit) * latents.slope[j];
  return !(bound.product <= base - bound.margin);
}

// Where an entry's pre is, limits being of rows.
struct Reach {
  float most;  // a limit that it cannot pass; infinite where there is none
  float near;  // what the codes say; NaN or infinite where they say nothing
  float
      deviation;  // of pre from that. The margin is that of Cauchy and Schwarz, for errors that point along a row; of d elements
                  // with signs that have no part in each other a dot product is margin / sqrt(d)
};

// From P to pre, for rows of d codes.
struct ReachScale {
  explicit ReachScale(int64_t d)
      : unit(1 / static_cast<double>(hadamard_block(d))),
        part(unit / std::sqrt(static_cast<double>(d))) {}
  double unit, part;
};

inline Reach reach_of(const ScreenBound& bound, const ReachScale& scale,
                      const ScreenLatents& latents, int64_t j) {
  // Base and slope are off by 2^-21 of their size, which is all there is where the margin is none.
  constexpr double kRounding = 0x1p-20, kLeast = 0x1p-126;
  const double base = latents.base[j] * scale.unit, pre = bound.product * scale.unit - base;
  const double top = pre + bound.margin * scale.unit;
  const float most = static_cast<float>(top + std::abs(top) * kRounding + kLeast);
  return {std::isnan(most) ? std::numeric_limits<float>::infinity() : most,
          static_cast<float>(pre - (std::abs(pre) + std::abs(base)) * kRounding),
          static_cast<float>(bound.margin * scale.part)};
}

// Scratch of one thread that quantises latents.
struct LatentScratch {
  FloatBuffer lanes, work, rows;
  std::vector<QuantisedChunk> chunks;
  Codes<uint8_t> codes;
  std::vector<LatentStats> stats;
  std::vector<float> scales;
};

// d_in padded as the codes are, and the scales of such a row.
int64_t screened_width(int64_t d_in);
inline int64_t screen_chunks(int64_t d) { return d / screen_chunk(d); }

// Quantises latents [begin, begin + count) of w, count <= kScreenBlock, into codes (kScreenBlock * d bytes), stats and
// scales [chunks][kScreenBlock].
void quantise_latents(const PaddedRows& w, int64_t begin, int64_t count, const float* center,
                      LatentScratch& scratch, uint8_t* codes, LatentStats* stats, float* scales);

// The bounds of latents [begin, begin + count).
ScreenLatents screen_latents(const EncodeLimits& limits, const LatentBlock& block, int64_t begin,
                             int64_t count, int64_t d);

// A group's codes [d / 4][16][4] as 16 rows of d bytes; both aligned to 4 bytes. Moved as 32-bit patterns.
void codes_to_rows(const void* codes, int64_t d, void* rows);

// The mean of a sample of rows, if subtracting it shortens them; else empty. n rows of d floats.
std::vector<float> choose_center(const float* x, int64_t x_stride, int64_t n, int64_t d);

inline const ScreenTable& screens() { return screen_table(simd_target()); }

}  // namespace gemmascope_fast
