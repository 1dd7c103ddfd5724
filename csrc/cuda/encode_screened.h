// The screened encoder on CUDA: int8 codes propose entries, with a margin that lets all but 1 in 10^6 pass; the weights
// decide.
//
// Packed bytes, made by pack_encoder.cu:
//
//   header    ScreenedHeader, 256 bytes
//   center    [width] float32, zeros behind d_in and where there is none
//   latents   [d_sae] LatentCodes
//   codes     [d_sae][width] int8                        each part begins at a multiple of 256 bytes
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "common/check.h"
#include "cuda/encode_tiles.h"
#include "cuda/screened_rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int64_t kScreenedMagic = 0x31306e7263736773;  // "gsscrn01"
constexpr int64_t kScreenedAlign = 256;
constexpr int64_t kMostScreenedWidth = 49152;  // a row as float32 lies in shared memory

struct ScreenedHeader {
  int64_t magic, d_in, d_sae;
  int32_t unscreened;  // latents whose every entry is a candidate
  int32_t centered;
};

// Where the parts are. Only sizes are looked at; the header is on the device.
struct ScreenedEncoder {
  int64_t d_in, d_sae, width;
  char* bytes;

  static int64_t padded(int64_t size) {
    return (size + kScreenedAlign - 1) / kScreenedAlign * kScreenedAlign;
  }
  int64_t latents_begin() const { return kScreenedAlign + padded(width * 4); }
  int64_t codes_begin() const {
    return latents_begin() + padded(d_sae * static_cast<int64_t>(sizeof(LatentCodes)));
  }
  int64_t size() const { return codes_begin() + d_sae * width; }
  ScreenedHeader* header() const { return reinterpret_cast<ScreenedHeader*>(bytes); }
  float* center() const { return reinterpret_cast<float*>(bytes + kScreenedAlign); }
  LatentCodes* latents() const { return reinterpret_cast<LatentCodes*>(bytes + latents_begin()); }
  int8_t* codes() const { return reinterpret_cast<int8_t*>(bytes + codes_begin()); }
};

// `packed` as that of a W_enc of this shape. Throws where its size is another.
ScreenedEncoder screened_encoder(const char* op, const Tensor& packed, const Tensor& W_enc);

// Null where the current device can screen with such weights; else the reason it cannot.
const char* why_not_screened(const Tensor& W_enc);

// Rows to int8, on the current device.
template <bool kLatents>
void quantise(const char* op, const QuantiseRows& p, cudaStream_t stream);

// What jumprelu_encode returns, without the view by feature; nothing where the plain encoder must serve. Waits once for
// the number of candidates, and again for that of the entries unless `max_nnz` fixes it.
std::optional<EncodeCsr> jumprelu_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                           const Tensor& bias, const Tensor& threshold,
                                           float window, std::optional<int64_t> max_nnz,
                                           const Tensor& packed, cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
