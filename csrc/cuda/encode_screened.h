// The screened encoders on CUDA: int8 codes propose entries, with a margin that lets all but 1 in 10^6 pass; the
// weights decide. JumpReLU: encode_screened.cu. TopK: topk_screened.h. BatchTopK: batchtopk_screened.h.
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
constexpr int kScreenedOwnShared = 2048;  // bytes that its kernels have without asking, at most

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

// One candidate costs as much as this many elements of the plain product, which takes over where there are more.
constexpr int64_t kElementsPerCandidate = 200;

// Whether GEMMASCOPE_FAST_SCREEN is `mode`.
bool screening_is(const char* mode);
// Null where a call can be screened now; else the reason it cannot.
const char* why_not_now(const Tensor& x, const Tensor& W_enc, cudaStream_t stream);

// x and W_enc as codes, on the current stream. `in.bias` is missing; scale and bound [n] are those of EncodeLimit.
struct ScreenedOperands {
  EncodeInputs in;
  Tensor scale, bound;
};
ScreenedOperands screened_operands(const char* op, const Tensor& x, const ScreenedEncoder& packed,
                                   const Tensor& bytes, cudaStream_t stream);

// Throws where the codes are those of another shape, or no codes.
void check_header(const char* op, const ScreenedEncoder& packed, const ScreenedHeader& header);

// The pre-activations of the first `count` candidates, in place of their values. W_enc's rows are wide
// (why_not_screened), bias is contiguous.
void rescore(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& bias,
             const EncodeCsr& candidates, int64_t count, cudaStream_t stream);

// For gsf.explain(); `why` is null where the call was screened.
void report_screened(const char* op, const Tensor& x, const Tensor& W_enc, const char* why,
                     const ScreenedHeader& header, int64_t candidates);

// What jumprelu_encode returns, without the view by feature; nothing where the plain encoder must serve. Waits once for
// the number of candidates, and again for that of the entries unless `max_nnz` fixes it.
std::optional<EncodeCsr> jumprelu_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                           const Tensor& bias, const Tensor& threshold,
                                           float window, std::optional<int64_t> max_nnz,
                                           const Tensor& packed, cudaStream_t stream);

}  // namespace on_cuda
}  // namespace gemmascope_fast
