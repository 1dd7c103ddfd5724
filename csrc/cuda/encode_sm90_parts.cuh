// What the CTAs of encode_sm90_kernel.cuh do one after the other: tiles, and halves of the last ones.
//
// P persistent CTAs take the tiles in turn, so that a last wave of few tiles lasts as long as a whole one. Where it has at
// most P / 2, each of them is done as two parts of 64 tokens, by a CTA of its own.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kSm90Tokens = 128;
constexpr int kSm90GroupTokens = kSm90Tokens / 2;  // of a warpgroup
constexpr int kSm90Latents = 256;

// Order of the tiles: `group` rows of tiles sweep the columns together, so that x of these rows and W of a few columns
// stay in L2. rows * columns < 2^31 and group <= rows. Tiles from `whole` on are done by halves.
struct Sm90Raster {
  uint32_t rows, columns, group, whole;
};

struct Sm90Tile {
  uint32_t row, column;
};

__device__ __forceinline__ Sm90Tile sm90_tile(const Sm90Raster& raster, uint32_t index) {
  const uint32_t sweep = raster.group * raster.columns;
  const uint32_t top = index / sweep * raster.group;
  const uint32_t height = min(raster.group, raster.rows - top);
  const uint32_t inside = index % sweep;
  return {top + inside % height, inside / height};
}

// A tile, of which the groups whose bits are set multiply their tokens.
struct Sm90Part {
  uint32_t row, column, groups;
};

__device__ __forceinline__ Sm90Part sm90_part(const Sm90Raster& raster, uint32_t index) {
  const bool half = index >= raster.whole;
  const uint32_t beyond = half ? index - raster.whole : 0;
  const Sm90Tile tile = sm90_tile(raster, half ? raster.whole + beyond / 2 : index);
  return {tile.row, tile.column, half ? 1u << beyond % 2 : 3u};
}

__host__ __device__ inline uint32_t sm90_parts(const Sm90Raster& raster) {
  return 2 * raster.rows * raster.columns - raster.whole;
}

// The tiles that are done whole by as many CTAs as there are processors.
inline uint32_t sm90_whole(uint32_t tiles, uint32_t processors) {
  const uint32_t tail = tiles % processors;
  return tail <= processors / 2 ? tiles - tail : tiles;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
