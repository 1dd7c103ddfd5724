// W_enc's int8 codes on CUDA, for the screened encoder (encode_screened.h); host wrapper of quantise_kernel.cuh.
//
//   pack_encoder(W_enc, center) -> bytes, or none where the device or the weights cannot be screened
//   repack_encoder_(bytes, W_enc, touched_at, step, tail): again those of the latents that this step of Adam has moved,
//   by the state that it leaves; without touched_at those of all
//
// pack_encoder waits for the device, to learn how many latents cannot be screened; repack_encoder_ does not.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cuda/encode_screened.h"
#include "cuda/operands.h"
#include "cuda/runtime.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "pack_encoder";
constexpr const char* kAgain = "repack_encoder_";
// More than one latent in so many that cannot be screened cost more than screening saves.
constexpr int64_t kMostUnscreened = 128;

QuantiseRows latents_of(const ScreenedEncoder& to, const Tensor& W_enc) {
  QuantiseRows p = {};
  p.rows = rows_of(features(W_enc));
  p.center = to.center();
  p.width = to.width;
  p.count = to.d_sae;
  p.codes = to.codes();
  p.latents = to.latents();
  p.unscreened = &to.header()->unscreened;
  return p;
}

void write_center(const ScreenedEncoder& to, const Tensor& center, cudaStream_t stream) {
  check_cuda(kOp, "copying the centre",
             cudaMemcpyAsync(to.center(), center.data_ptr(), static_cast<size_t>(to.d_in) * 4,
                             cudaMemcpyDeviceToDevice, stream));
}

}  // namespace

Tensor pack_encoder_cuda(const Tensor& W_enc, std::optional<Tensor> center) {
  check_dim(kOp, "W_enc", W_enc, 2);
  check_float(kOp, "W_enc", W_enc);
  const Tensor middle =
      center ? vector_of(kOp, "center", *center, ScalarType::Float, W_enc.size(0), W_enc) : W_enc;
  const torch::stable::accelerator::DeviceGuard guard(W_enc.get_device_index());
  const cudaStream_t stream = current_stream(kOp, W_enc);
  const Tensor none = torch::stable::new_empty(W_enc, {0}, ScalarType::Byte);
  if (why_not_screened(W_enc) != nullptr) return none;
  ScreenedEncoder to = {W_enc.size(0), W_enc.size(1), screened_width(W_enc.size(0)), nullptr};
  Tensor bytes = torch::stable::new_empty(W_enc, {to.size()}, ScalarType::Byte);
  to.bytes = static_cast<char*>(bytes.data_ptr());
  check_cuda(kOp, "clearing the header",
             cudaMemsetAsync(to.bytes, 0, static_cast<size_t>(to.codes_begin()), stream));
  ScreenedHeader header = {kScreenedMagic, to.d_in, to.d_sae, 0, center.has_value()};
  check_cuda(kOp, "writing the header",
             cudaMemcpyAsync(to.bytes, &header, sizeof(header), cudaMemcpyHostToDevice, stream));
  if (center) write_center(to, middle, stream);
  quantise<true>(kOp, latents_of(to, W_enc), stream);
  check_cuda(kOp, "reading the header",
             cudaMemcpyAsync(&header, to.bytes, sizeof(header), cudaMemcpyDeviceToHost, stream));
  check_cuda(kOp, "waiting for the codes", cudaStreamSynchronize(stream));
  return header.unscreened * kMostUnscreened > to.d_sae ? none : bytes;
}

void repack_encoder_cuda(Tensor packed, const Tensor& W_enc, std::optional<Tensor> touched_at,
                         int64_t step, int64_t tail) {
  check_dim(kAgain, "W_enc", W_enc, 2);
  check_float(kAgain, "W_enc", W_enc);
  check_device(kAgain, "packed", packed, W_enc);
  const Tensor touched = touched_at ? vector_of(kAgain, "touched_at", *touched_at, ScalarType::Long,
                                                W_enc.size(1), W_enc)
                                    : W_enc;
  const torch::stable::accelerator::DeviceGuard guard(W_enc.get_device_index());
  QuantiseRows p = latents_of(screened_encoder(kAgain, packed, W_enc), W_enc);
  if (touched_at) p.touched_at = static_cast<const int64_t*>(touched.data_ptr());
  p.step = step;
  p.tail = tail;
  quantise<true>(kAgain, p, current_stream(kAgain, W_enc));
}

STABLE_TORCH_LIBRARY_FRAGMENT(gemmascope_fast, m) {
  m.def(
      "repack_encoder_(Tensor(a!) packed, Tensor W_enc, Tensor? touched_at=None, int step=0, "
      "int tail=0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("pack_encoder", TORCH_BOX(&pack_encoder_cuda));
  m.impl("repack_encoder_", TORCH_BOX(&repack_encoder_cuda));
}

}  // namespace gemmascope_fast
