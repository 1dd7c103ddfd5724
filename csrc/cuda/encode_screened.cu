// Host side of the screened JumpReLU encoder; what is computed, and how sure it is: quantise_kernel.cuh.
//
//   x -> codes and bounds of the tokens, limits of the latents    quantise_kernel, screen_limit_kernel
//   codes -> candidates, as CSR                                   encode_sm90_kernel<int8_t>, place_kernel.cuh
//   candidates -> pre-activations -> entries                      rescore_kernel.cuh
//
// Bound by the int8 products, 2 n d_in d_sae operations, and 2 d_in bytes per candidate.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/encode_report.h"
#include "cuda/encode_screened.h"
#include "cuda/encode_sm90.h"
#include "cuda/operands.h"
#include "cuda/quantise_kernel.cuh"
#include "cuda/rescore_kernel.cuh"
#include "cuda/runtime.h"
#include "cuda/shared_limit.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

// Records of the first arena: 2 KiB per token. More than fit cost a second pass over the strips that missed.
constexpr int64_t kRecordsPerToken = 256;
constexpr int64_t kSmallestArena = 65536;
constexpr int64_t kGrid = int64_t{1} << 16;

Tensor empty(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size}, dtype);
}

unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(std::clamp((items + per_block - 1) / per_block, int64_t{1}, kGrid));
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();  // another stream's capture forbids the question
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

struct Call {
  const char* op;
  cudaStream_t stream;
  const Tensor &x, &W_enc, &bias, &threshold, &bytes;
  float window;
  ScreenedEncoder packed;
};

EncodeHits screen(const Call& call, int64_t arena) {
  const ScreenedEncoder& packed = call.packed;
  ScreenedOperands given = screened_operands(call.op, call.x, packed, call.bytes, call.stream);
  given.in.bias = call.bias;
  EncodeLimit limit;
  limit.kind = Limit::kScreened;
  limit.values = given.bound;
  limit.scale = given.scale;
  limit.latent = latent_limits(call.op, call.bias, call.threshold, call.window, call.stream);
  limit.first = 0;
  limit.last = packed.d_sae;
  const unsigned blocks =
      static_cast<unsigned>((packed.d_sae + kQuantiseThreads - 1) / kQuantiseThreads);
  screen_limit_kernel<<<blocks, kQuantiseThreads, 0, call.stream>>>(packed.latents(), packed.d_sae,
                                                                    data<float>(limit.latent));
  check_launch(call.op);
  return encode_hits(call.op, given.in, limit, arena, call.stream);
}

// What the host must know before it goes on: the first wait.
struct Sizes {
  int64_t reserved, candidates;
  ScreenedHeader header;
};
Sizes read_sizes(const Call& call, const EncodeHits& hits) {
  Sizes sizes = {};
  Readback found(call.op, call.stream);
  found.read(&sizes.reserved, hits.reserved(), 8);
  found.read(&sizes.candidates, data<int64_t>(hits.offsets) + hits.tiles.n, 8);
  found.read(&sizes.header, call.packed.header(), sizeof(ScreenedHeader));
  found.wait();
  check_header(call.op, call.packed, sizes.header);
  return sizes;
}

// The entries among the rescored candidates.
EncodeCsr keep(const Call& call, const EncodeCsr& candidates, std::optional<int64_t> max_nnz) {
  const int64_t n = call.x.size(0);
  const Tensor offsets = empty(candidates.offsets, n + 1, ScalarType::Long);
  KeepEntries p = {};
  p.offsets = data<int64_t>(candidates.offsets);
  p.indices = data<int32_t>(candidates.indices);
  p.values = data<float>(candidates.values);
  p.threshold = data<float>(call.threshold);
  p.window = call.window;
  p.n = n;
  p.kept_offsets = data<int64_t>(offsets);
  const unsigned blocks = blocks_of(n, kRescoreWarps);
  count_kept_kernel<<<blocks, kRescoreThreads, 0, call.stream>>>(p);
  check_launch(call.op);
  sum_counts(call.op, offsets, call.stream);
  int64_t capacity = max_nnz.value_or(0);
  if (!max_nnz) {
    Readback entries(call.op, call.stream);
    entries.read(&capacity, p.kept_offsets + n, 8);
    entries.wait();
  }
  const EncodeCsr out = new_csr(call.op, offsets, capacity, true, call.stream);
  p.needed = data<int64_t>(out.needed);
  p.capacity = capacity;
  p.kept_indices = data<int32_t>(out.indices);
  p.kept_values = data<float>(out.values);
  p.kept_gate = data<float>(out.gate);
  keep_kernel<<<blocks, kRescoreThreads, 0, call.stream>>>(p);
  check_launch(call.op);
  pad_csr(call.op, out, call.stream);
  return out;
}

void report(const Call& call, const char* why_direct, const Sizes& sizes) {
  report_screened(call.op, call.x, call.W_enc, why_direct, sizes.header, sizes.candidates);
}

}  // namespace

bool screening_is(const char* mode) {
  const char* choice = std::getenv("GEMMASCOPE_FAST_SCREEN");
  return choice != nullptr && std::strcmp(choice, mode) == 0;
}

const char* why_not_now(const Tensor& x, const Tensor& W_enc, cudaStream_t stream) {
  return x.size(0) == 0          ? "there are no tokens"
         : screening_is("never") ? "GEMMASCOPE_FAST_SCREEN=never"
         : is_capturing(stream)  ? "a CUDA graph cannot wait for the candidates"
                                 : why_not_screened(W_enc);
}

ScreenedOperands screened_operands(const char* op, const Tensor& x, const ScreenedEncoder& packed,
                                   const Tensor& bytes, cudaStream_t stream) {
  const int64_t n = x.size(0);
  ScreenedOperands made;
  made.in.x = torch::stable::new_empty(x, {n, packed.width}, ScalarType::Char);
  Tensor whole = bytes;
  const Tensor codes =
      torch::stable::narrow(whole, 0, packed.codes_begin(), packed.d_sae * packed.width);
  made.in.W = torch::stable::view(codes, {packed.d_sae, packed.width});
  made.in.dtype = Dtype::kFloat32;
  made.scale = empty(x, n, ScalarType::Float);
  made.bound = empty(x, n, ScalarType::Float);
  QuantiseRows tokens = {};
  tokens.rows = rows_of(x);
  tokens.center = packed.center();
  tokens.width = packed.width;
  tokens.count = n;
  tokens.codes = data<int8_t>(made.in.x);
  tokens.scale = data<float>(made.scale);
  tokens.bound = data<float>(made.bound);
  quantise<false>(op, tokens, stream);
  return made;
}

void rescore(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& bias,
             const EncodeCsr& candidates, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  Rescore p = {};
  p.x = rows_of(x);
  p.W = rows_of(features(W_enc));
  p.bias = data<float>(bias);
  p.offsets = data<int64_t>(candidates.offsets);
  p.indices = data<int32_t>(candidates.indices);
  p.values = data<float>(candidates.values);
  p.count = count;
  const bool wide = p.W.dtype == kFloat32;
  const int shared = static_cast<int>(rescore_shared(p.x.cols, wide));
  const void* kernel = wide ? reinterpret_cast<const void*>(&rescore_kernel<true>)
                            : reinterpret_cast<const void*>(&rescore_kernel<false>);
  check_cuda(op, "shared memory of the rescoring", raise_shared_limit(kernel, kScreenedOwnShared));
  const int64_t blocks = (count + kRescoreSpan - 1) / kRescoreSpan;
  void* arguments[] = {&p};
  check_cuda(op, "launch of the rescoring",
             cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kRescoreThreads),
                              arguments, static_cast<size_t>(shared), stream));
}

void check_header(const char* op, const ScreenedEncoder& packed, const ScreenedHeader& header) {
  if (header.magic != kScreenedMagic || header.d_in != packed.d_in ||
      header.d_sae != packed.d_sae) {
    fail(op, "packed must come from pack(precision=\"screened\") of a W_enc of shape [",
         packed.d_in, ", ", packed.d_sae, "]");
  }
}

void report_screened(const char* op, const Tensor& x, const Tensor& W_enc, const char* why,
                     const ScreenedHeader& header, int64_t candidates) {
  EncodeReport said;
  said.op = op;
  said.target = "cuda sm_90a";
  said.why_direct = why;
  said.packed = true;
  said.centered = header.centered != 0;
  said.n = x.size(0);
  said.d_in = x.size(1);
  said.d_sae = W_enc.size(1);
  said.screened_blocks = why == nullptr ? (said.d_sae + 255) / 256 : 0;
  said.candidates = said.rescored = candidates;
  set_encode_report(said);
}

ScreenedEncoder screened_encoder(const char* op, const Tensor& packed, const Tensor& W_enc) {
  check_dim(op, "packed", packed, 1);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  ScreenedEncoder found = {W_enc.size(0), W_enc.size(1), screened_width(W_enc.size(0)),
                           static_cast<char*>(packed.data_ptr())};
  if (packed.size(0) != found.size() || packed.stride(0) != 1 ||
      reinterpret_cast<uintptr_t>(found.bytes) % 16 != 0) {
    fail(op, "packed must come from pack(precision=\"screened\") of a W_enc of shape [", found.d_in,
         ", ", found.d_sae, "]");
  }
  return found;
}

const char* why_not_screened(const Tensor& W_enc) {
  const Rows rows = rows_of(features(W_enc));
  if (rows.rows < 1 || rows.cols < 128 || rows.cols > kMostScreenedWidth) {
    return "d_in is not in 128 .. 49152, or there are no latents";
  }
  if (!rows.wide) return "rows of W_enc.t() are not contiguous, or not whole words of 16 bytes";
  EncodeTiles p = {};
  p.n = 1;
  p.d = screened_width(rows.cols);
  p.d_sae = p.last = rows.rows;
  p.x_stride = p.W_stride = p.d;
  return encode_sm90_serves(p, Dtype::kFloat32, Limit::kScreened)
             ? nullptr
             : "the device is not of compute capability 9.0, or not built for";
}

template <bool kLatents>
void quantise(const char* op, const QuantiseRows& p, cudaStream_t stream) {
  if (p.count == 0) return;
  const int shared = static_cast<int>(p.width) * 4;
  const void* kernel = reinterpret_cast<const void*>(&quantise_kernel<kLatents>);
  check_cuda(op, "shared memory of the codes", raise_shared_limit(kernel, kScreenedOwnShared));
  quantise_kernel<kLatents>
      <<<blocks_of(p.count, 1), kQuantiseThreads, static_cast<size_t>(shared), stream>>>(p);
  check_launch(op);
}
template void quantise<true>(const char*, const QuantiseRows&, cudaStream_t);
template void quantise<false>(const char*, const QuantiseRows&, cudaStream_t);

std::optional<EncodeCsr> jumprelu_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                           const Tensor& bias, const Tensor& threshold,
                                           float window, std::optional<int64_t> max_nnz,
                                           const Tensor& packed, cudaStream_t stream) {
  Call call = {op, stream, x, W_enc, bias, threshold, packed, window, {}};
  const char* why = why_not_now(x, W_enc, stream);
  if (why != nullptr) {
    report(call, why, {});
    return std::nullopt;
  }
  call.packed = screened_encoder(op, packed, W_enc);
  const int64_t elements = x.size(0) * W_enc.size(1);
  const int64_t arena = std::min(std::max(kRecordsPerToken * x.size(0), kSmallestArena), elements);
  EncodeHits hits = screen(call, arena);
  const Sizes sizes = read_sizes(call, hits);
  if (sizes.candidates * kElementsPerCandidate > elements && !screening_is("always")) {
    report(call, "too many candidates", sizes);
    return std::nullopt;
  }
  if (sizes.reserved > arena) encode_missing(op, hits, sizes.reserved, stream);
  const EncodeCsr candidates = place_hits(op, hits, sizes.candidates, true, stream);
  rescore(op, x, W_enc, bias, candidates, sizes.candidates, stream);
  report(call, nullptr, sizes);
  return keep(call, candidates, max_nnz);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
