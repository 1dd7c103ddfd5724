// The tiles of a problem as encode_sm90.cu lists them, but two rows of tiles to a group.
#pragma once

#include "cuda/encode_sm90_parts.cuh"
#include "cuda/encode_tiles.cuh"

namespace gemmascope_fast {
namespace {

inline Sm90Raster raster_on_cpu(const EncodeTiles& p, uint32_t processors) {
  const uint32_t rows = static_cast<uint32_t>((p.n + kSm90Tokens - 1) / kSm90Tokens);
  const uint32_t columns =
      static_cast<uint32_t>((p.last - p.first + kSm90Latents - 1) / kSm90Latents);
  return {rows, columns, rows > 1 ? 2u : 1u, sm90_whole(rows * columns, processors)};
}

}  // namespace
}  // namespace gemmascope_fast
