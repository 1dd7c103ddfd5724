// When the hot/cold split of a backward pays (cuda/hot_latents.cuh).
//
// With H hot latents in m = ceil(H / 128) tiles, on P processors of which each works at one tile of 128 x 256 sums at a
// time, and all together at R operations per second:
//
//   tile(K) = 2 * 128 * 256 * K P / R,   waves(N) = ceil(m ceil(N / 256) / P)
//   products = waves(n) tile(d_out) + waves(d_out) tile(2 n) + waves(d_in) tile(2 n)
//   moved    = 4 n (d_out + d_in) + 20 n 128 m      both transposes; sums read, two panels of two terms written, read
//
// The split pays from so many entries of the hot latents on as the pass reads in that time, 2 (d_out + d_in) bytes each.
// One wave takes as long as it takes however many of its tiles are needed, so the panels have room for the tiles of one
// wave of either gradient.
//
// A batch in which nothing is hot pays for the question: 7 to 11 % of a backward were seen on an H200. So it is asked
// only where the usual answer is yes: rates of trained dictionaries are about log-normal with sigma = 2, and of these the
// hottest q of all latents have the share 1 - Phi(z - 2) of the entries, Phi(z) = 1 - q.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace gemmascope_fast {

constexpr int64_t kHotTileRows = 128, kHotTileColumns = 256;
constexpr int64_t kHotMostTiles = 8;
constexpr double kHotOperations = 690e12;  // per second; this and the pass measured on an H200
constexpr double kHotMoved = 3.0e12;       // bytes per second
constexpr double kHotGathered = 4.5e12;    // bytes per second of the pass
constexpr double kHotSeconds = 4e-5;       // of a dozen launches
constexpr int64_t kHotLargest = int64_t{1} << 30;  // bytes beside the gradients
constexpr double kHotGain = 0.15;
constexpr int64_t kHotShare = 128;  // a hot latent fires on 1 in so many tokens, or more

struct HotShape {
  int64_t n, d_in, d_out, d_sae, processors;
};

inline int64_t hot_blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of the panels.
inline int64_t hot_most(const HotShape& s) {
  const int64_t columns = hot_blocks(std::max(s.d_in, s.d_out), kHotTileColumns);
  const int64_t wave = std::clamp<int64_t>(s.processors / columns, 1, kHotMostTiles);
  return kHotTileRows * std::min(wave, hot_blocks(s.d_sae, kHotTileRows));
}

// Entries that the products of `tiles` tiles of rows are worth.
inline int64_t hot_worth(const HotShape& s, int64_t tiles) {
  const double n = static_cast<double>(s.n);
  const double columns = static_cast<double>(s.d_in) + static_cast<double>(s.d_out);
  const auto wave = [&](int64_t width, double depth) {
    const int64_t waves =
        hot_blocks(tiles * hot_blocks(width, kHotTileColumns), std::max<int64_t>(s.processors, 1));
    return static_cast<double>(waves) * 2.0 * kHotTileRows * kHotTileColumns * depth *
           static_cast<double>(s.processors) / kHotOperations;
  };
  const double products =
      wave(s.n, static_cast<double>(s.d_out)) + wave(s.d_out, 2 * n) + wave(s.d_in, 2 * n);
  const double moved = 4 * n * columns + 20.0 * n * kHotTileRows * static_cast<double>(tiles);
  const double seconds = kHotSeconds + products + moved / kHotMoved;
  return static_cast<int64_t>(std::ceil(seconds * kHotGathered / (2 * columns)));
}

// The share of all entries that belongs to the hottest `part` of the latents, if rates are log-normal.
inline double hot_share(double part) {
  constexpr double kSigma = 2;
  const auto above = [](double z) { return 0.5 * std::erfc(z / std::sqrt(2.0)); };
  double low = -8, high = 8;
  for (int step = 0; step < 40; ++step) {
    const double z = 0.5 * (low + high);
    (above(z) > part ? low : high) = z;
  }
  return above(low - kSigma);
}

// Whether the split would save kHotGain of a pass over so many entries, if rates are log-normal.
inline bool hot_expected(const HotShape& s, int64_t entries) {
  const int64_t most = hot_most(s);
  const double all = static_cast<double>(entries), part = static_cast<double>(most) / s.d_sae;
  const double cost = static_cast<double>(hot_worth(s, most / kHotTileRows));
  return (part < 1 ? hot_share(part) : 1.0) * all > cost + kHotGain * all;
}

// Memory that the products take: one transpose, sums, two panels of two terms, and decoder rows.
inline int64_t hot_bytes(const HotShape& s) {
  return 2 * s.n * std::max(s.d_in, s.d_out) + hot_most(s) * (12 * s.n + 2 * s.d_out);
}

}  // namespace gemmascope_fast
