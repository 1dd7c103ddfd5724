// W_enc's codes and their stats in one byte tensor, for encoders whose weights stay as they are.
//
//   header    64 bytes: magic, d_in, d_sae, 1 if a centre follows
//   center    d_in float32, padded to 64 bytes, if any
//   blocks    of kScreenBlock latents: codes + 128 [3 groups][d / 4][16][4], LatentStats [48], scales [chunks][48]
//
// 1 byte a weight, 12 a latent and 4 a chunk of it: at d = 1152 1.021 bytes a weight, d padded to a multiple of 64.
#pragma once

#include <optional>

#include "common/check.h"
#include "cpu/screen.h"

namespace gemmascope_fast {

class PackedEncoder {
 public:
  // Checks that `bytes` was packed from a W_enc of this shape.
  PackedEncoder(const char* op, const Tensor& bytes, int64_t d_in, int64_t d_sae);

  const float* center() const { return center_; }
  LatentBlock block(int64_t index) const {
    const uint8_t* codes = blocks_ + index * block_bytes_;
    const auto* stats = reinterpret_cast<const LatentStats*>(codes + kScreenBlock * d_);
    return {codes, stats, reinterpret_cast<const float*>(stats + kScreenBlock)};
  }

 private:
  int64_t d_, block_bytes_;
  const float* center_;
  const uint8_t* blocks_;
};

// The optional argument of the encoders' ops.
std::optional<PackedEncoder> packed_encoder(const char* op, const std::optional<Tensor>& bytes,
                                            const Tensor& W_enc);

}  // namespace gemmascope_fast
