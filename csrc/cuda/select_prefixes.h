// The order in which the TopK encoders scan the latents: prefixes that double, or grow faster where rows are few.
//
//   best of [0, 2 c) = best of (best of [0, c) and the candidates of [c, 2 c))
//
// The k-th best of any prefix bounds the final k-th best from below, so a chunk emits only what exceeds it: about k per
// row for exchangeable latents, whatever its width. A first chunk emits what is positive, half of its width or so.
// Doubling makes that k log2(d_sae / first) candidates per row and as many launches, exactly, without state between
// calls.
//
// Memory: all chunks have room for first * rows candidates, 16 bytes each: a chunk no wider than the first cannot
// overflow, a wider one, which holds k per row, as good as never. 8,192 rows and k = 64: 2^22 candidates, 64 MiB; at
// most kMostRoom, 256 MiB, unless 64 rows need more (k > 2^16). More rows than fit go in blocks of rows.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace gemmascope_fast {
inline namespace on_cuda {

// `first` is a multiple of this, as encode_tiles.cuh wants it.
constexpr int64_t kPrefixUnit = 256;
// Pairs that keep a large GPU busy: 128 tiles of 128 x 256.
constexpr int64_t kBusyPairs = int64_t{1} << 22;
// Widest first chunk that is chosen to keep the GPU busy: few rows do not get it busy anyway.
constexpr int64_t kWidestFirst = 4096;
constexpr int64_t kMostRoom = int64_t{1} << 24;
// Rows that share one read of W (encode_few_kernel.cuh): each chunk costs launches, and more of the GPU the wider it
// is.
constexpr int64_t kFewRows = 16;

struct Prefix {
  int64_t first, last;
};

// Width of the first prefix: at least 4 k, so that it has k positive entries as a rule.
inline int64_t first_prefix(int64_t n, int64_t k) {
  int64_t width = std::max<int64_t>((4 * k + kPrefixUnit - 1) / kPrefixUnit, 1) * kPrefixUnit;
  while (width * 2 <= kWidestFirst && n * width < kBusyPairs) width *= 2;
  return width;
}

// How much longer each prefix is than the one before. A chunk that ends at g times its begin finds about (g - 1) k per
// row: few rows let it fill half of the room, k = 64 of 65,536 latents in two chunks rather than five.
inline int64_t prefix_growth(int64_t n, int64_t k, int64_t width) {
  int64_t growth = 2;
  while (n <= kFewRows && 4 * growth * std::max<int64_t>(k, 1) <= width) growth *= 2;
  return growth;
}

// [0, width), [width, growth width), ... of [0, d_sae).
inline std::vector<Prefix> prefixes(int64_t d_sae, int64_t width, int64_t growth) {
  std::vector<Prefix> all;
  for (int64_t begin = 0; begin < d_sae;) {
    const int64_t end = std::min(std::max(width, growth * begin), d_sae);
    all.push_back({begin, end});
    begin = end;
  }
  return all;
}

// What is left to scan when the chunk from `begin` on lost candidates: no chunk here can.
inline std::vector<Prefix> equal_chunks(int64_t begin, int64_t d_sae, int64_t width) {
  std::vector<Prefix> all;
  for (; begin < d_sae; begin += width) all.push_back({begin, std::min(begin + width, d_sae)});
  return all;
}

// Rows that are scanned together: as many as kMostRoom has room for, in multiples of 64.
inline int64_t rows_at_once(int64_t n, int64_t width) {
  return std::min(n, std::max<int64_t>(kMostRoom / width / 64, 1) * 64);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
