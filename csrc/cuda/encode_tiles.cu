#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <cub/device/device_scan.cuh>
#include <limits>

#include "cuda/encode_few.h"
#include "cuda/encode_few_kernel.cuh"
#include "cuda/encode_limit_kernel.cuh"
#include "cuda/encode_sm90.h"
#include "cuda/encode_tile_kernel.cuh"
#include "cuda/encode_tiles.h"
#include "cuda/place_kernel.cuh"
#include "cuda/runtime.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

Tensor empty(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size}, dtype);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// t [rows, d] as EncodeInputs wants it.
Tensor aligned_rows(const Tensor& t, ScalarType dtype) {
  const int64_t rows = t.size(0), d = t.size(1), bytes = dtype == ScalarType::Float ? 4 : 2;
  const int64_t line = 16 / bytes, wide = std::max(ceil_div(d, line), int64_t{1}) * line;
  const bool ready = t.scalar_type() == dtype && d == wide && t.stride(1) == 1 &&
                     t.stride(0) % line == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  if (ready) return t;
  Tensor copy = d == wide ? torch::stable::new_empty(t, {rows, wide}, dtype)
                          : torch::stable::new_zeros(t, {rows, wide}, dtype);
  Tensor inside = torch::stable::narrow(copy, 1, 0, d);
  torch::stable::copy_(inside, t);
  return copy;
}

template <typename T, class Shape>
const void* tile_kernel(Limit limit) {
  return limit == Limit::kPerLatent
             ? reinterpret_cast<const void*>(&encode_tile_kernel<T, Limit::kPerLatent, Shape>)
             : reinterpret_cast<const void*>(&encode_tile_kernel<T, Limit::kPerToken, Shape>);
}

template <class Shape>
const void* tile_kernel(Dtype dtype, Limit limit) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return tile_kernel<__nv_bfloat16, Shape>(limit);
    case Dtype::kFloat16:
      return tile_kernel<__half, Shape>(limit);
    default:
      return tile_kernel<float, Shape>(limit);
  }
}

template <class Shape>
void encode_portable(const char* op, const EncodeTiles& p, Dtype dtype, Limit limit,
                     cudaStream_t stream) {
  const int64_t tiles = tile_rows<Shape>(p) * tile_columns<Shape>(p);
  if (tiles > std::numeric_limits<int32_t>::max()) {
    fail(op, "n * d_sae is too large: ", tiles, " tiles exceed the largest grid, 2^31 - 1");
  }
  const void* kernel = tile_kernel<Shape>(dtype, limit);
  check_cuda(
      op, "shared memory of the encoder's tile",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kShared));
  EncodeTiles copy = p;
  void* arguments[] = {&copy};
  check_cuda(op, "launch of the encoder's tiles",
             cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(tiles)), dim3(Shape::kThreads),
                              arguments, Shape::kShared, stream));
}

bool is_small(const EncodeTiles& p) { return p.n <= SmallTile::kTokens; }

// GEMMASCOPE_FAST_CUDA_ENCODE=portable: for comparisons.
bool prefers_portable() {
  const char* choice = std::getenv("GEMMASCOPE_FAST_CUDA_ENCODE");
  return choice != nullptr && std::strcmp(choice, "portable") == 0;
}

bool uses_sm90(const EncodeTiles& p, Dtype dtype, Limit limit) {
  if (multiplies_codes(limit)) return true;
  return !is_small(p) && !prefers_portable() && encode_sm90_serves(p, dtype, limit);
}

PlaceHits place_arguments(const EncodeHits& hits) {
  PlaceHits p = {};
  p.tiles = hits.tiles;
  p.width = hits.width;
  p.column_blocks = ceil_div(hits.tiles.last - hits.tiles.first, hits.width);
  p.bases = data<uint32_t>(hits.bases);
  p.offsets = data<int64_t>(hits.offsets);
  return p;
}

PlaceHits csr_arguments(PlaceHits p, const EncodeCsr& csr) {
  p.tiles.n = csr.offsets.size(0) - 1;
  p.offsets = data<int64_t>(csr.offsets);
  p.needed = data<int64_t>(csr.needed);
  p.capacity = csr.indices.size(0);
  p.indices = data<int32_t>(csr.indices);
  p.values = data<float>(csr.values);
  p.gate = csr.gate.size(0) == p.capacity ? data<float>(csr.gate) : nullptr;
  return p;
}

// What starts at zero: the records reserved, and for JumpReLU the invalid latents.
void start_state(const char* op, EncodeHits& hits, const EncodeInputs& in, cudaStream_t stream) {
  const int64_t tokens = hits.kind == Limit::kPerLatent ? hits.tiles.n : 0;
  hits.state = empty(in.bias, 2 + tokens, ScalarType::Int);
  check_cuda(
      op, "clearing counters",
      cudaMemsetAsync(hits.state.data_ptr(), 0, static_cast<size_t>(2 + tokens) * 4, stream));
  hits.tiles.needed = data<unsigned long long>(hits.state);
}

// Entries that nobody wrote yet; `needed` neither.
EncodeCsr allocate_csr(const Tensor& offsets, int64_t capacity, bool gated) {
  EncodeCsr out;
  out.offsets = offsets;
  out.indices = empty(offsets, capacity, ScalarType::Int);
  out.values = empty(offsets, capacity, ScalarType::Float);
  out.gate = empty(offsets, gated ? capacity : 0, ScalarType::Float);
  out.needed = torch::stable::new_empty(offsets, {}, ScalarType::Long);
  return out;
}

void set_limit(const char* op, EncodeHits& hits, const EncodeInputs& in, const EncodeLimit& limit,
               cudaStream_t stream) {
  EncodeTiles& p = hits.tiles;
  hits.values = limit.values;
  if (limit.kind != Limit::kPerLatent) {
    p.bound = data<float>(limit.values);
    hits.scale = limit.scale;
    hits.limit = limit.latent;
    hits.least = limit.least;
    if (multiplies_codes(limit.kind)) {
      p.scale = data<float>(hits.scale);
      p.limit = data<float>(hits.limit);
    }
    if (limit.kind == Limit::kUpperBound) p.least = data<float>(hits.least);
    return;
  }
  if (!uses_few(p, in.dtype, limit.kind)) {
    hits.limit = latent_limits(op, in.bias, limit.values, limit.window, stream);
    p.limit = data<float>(hits.limit);
  }
  p.threshold = data<float>(limit.values);
  p.window = limit.window;
  p.invalid = data<int32_t>(hits.state) + 2;
}

// Counts to exclusive sums, and the offsets of all tokens.
void scan_counts(const char* op, const EncodeHits& hits, cudaStream_t stream) {
  const PlaceHits p = place_arguments(hits);
  if (p.tiles.n <= kStripTokens) {
    scan_few_kernel<<<1, kPlaceThreads, 0, stream>>>(p);
    check_launch(op);
    return;
  }
  const int64_t items = p.groups() * p.tokens() / 2, size = p.tiles.n + 1;
  if (items > 0) {
    scan_counts_kernel<<<place_blocks(items), kPlaceThreads, 0, stream>>>(p);
    check_launch(op);
  }
  scan_groups_kernel<<<place_blocks(size * 32), kPlaceThreads, 0, stream>>>(p);
  check_launch(op);
  sum_counts(op, hits.offsets, stream);
}

void allocate_outputs(EncodeHits& hits, const EncodeInputs& in, int64_t arena) {
  EncodeTiles& p = hits.tiles;
  PlaceHits sizes = {};
  sizes.tiles = p;
  sizes.column_blocks = ceil_div(p.last - p.first, hits.width);
  hits.counts = empty(in.bias, sizes.column_blocks * sizes.tokens(), ScalarType::Short);
  hits.runs = empty(in.bias, sizes.column_blocks * sizes.strips(), ScalarType::Long);
  hits.bases = empty(in.bias, sizes.groups() * sizes.tokens(), ScalarType::Int);
  hits.records = empty(in.bias, arena, ScalarType::Long);
  hits.offsets = empty(in.bias, p.n + 1, ScalarType::Long);
  p.counts = data<uint16_t>(hits.counts);
  p.runs = data<uint64_t>(hits.runs);
  p.records = data<uint64_t>(hits.records);
  p.arena = static_cast<uint64_t>(arena);
}

}  // namespace

void check_encode(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc) {
  check_dim(op, "x", x, 2);
  check_dim(op, "W_enc", W_enc, 2);
  check_float(op, "x", x);
  check_float(op, "W_enc", W_enc);
  check_dtype(op, "b_enc", b_enc, ScalarType::Float);
  if (W_enc.size(0) != x.size(1)) {
    fail(op, "W_enc must have shape [d_in=", x.size(1), ", d_sae], got ", shape_of(W_enc));
  }
  check_shape(op, "b_enc", b_enc, {W_enc.size(1)});
  if (W_enc.size(1) > std::numeric_limits<int32_t>::max()) {
    fail(op, "d_sae must be below 2^31 (indices are int32), got ", W_enc.size(1));
  }
  for (const Tensor* t : {&x, &W_enc, &b_enc}) {
    if (!t->is_cuda() || t->get_device_index() != x.get_device_index()) {
      fail(op, "x, W_enc and b_enc must be on one CUDA device");
    }
  }
}

Tensor tokens_of(const Tensor& t, int64_t begin, int64_t rows) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, begin, rows);
}

EncodeInputs EncodeInputs::of_rows(int64_t begin, int64_t rows) const {
  EncodeInputs part = *this;
  part.x = tokens_of(x, begin, rows);
  return part;
}

EncodeInputs encode_inputs(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc) {
  const ScalarType dtype =
      x.scalar_type() == W_enc.scalar_type() ? x.scalar_type() : ScalarType::Float;
  EncodeInputs in;
  in.x = aligned_rows(x, dtype);
  in.W = aligned_rows(torch::stable::transpose(W_enc, 0, 1), dtype);
  in.bias = torch::stable::contiguous(b_enc);
  in.dtype = dtype_of(in.x);
  return in;
}

bool uses_few(const EncodeTiles& p, Dtype dtype, Limit limit) {
  return !prefers_portable() && encode_few_serves(p, dtype, limit);
}

EncodeTiles tiles_of(const EncodeInputs& in, int64_t first, int64_t last) {
  EncodeTiles p = {};
  p.x = in.x.data_ptr();
  p.W = in.W.data_ptr();
  p.n = in.n();
  p.d = in.x.size(1);
  p.d_sae = in.d_sae();
  p.x_stride = in.x.stride(0);
  p.W_stride = in.W.stride(0);
  p.first = first;
  p.last = last;
  p.bias = data<float>(in.bias);
  return p;
}

int encode_width(const EncodeTiles& p, Dtype dtype, Limit limit) {
  if (uses_few(p, dtype, limit)) return kFewWidth;
  if (uses_sm90(p, dtype, limit)) return 256;
  return is_small(p) ? SmallTile::kWidth : LargeTile::kWidth;
}

Tensor latent_limits(const char* op, const Tensor& bias, const Tensor& threshold, float window,
                     cudaStream_t stream) {
  const int64_t d_sae = bias.size(0);
  const Tensor limit = empty(bias, d_sae, ScalarType::Float);
  if (d_sae == 0) return limit;
  const unsigned blocks = static_cast<unsigned>(ceil_div(d_sae, kLimitThreads));
  encode_limit_kernel<<<blocks, kLimitThreads, 0, stream>>>(
      data<float>(bias), data<float>(threshold), window, d_sae, data<float>(limit));
  check_launch(op);
  return limit;
}

void sum_counts(const char* op, const Tensor& counts, cudaStream_t stream) {
  int64_t* at = data<int64_t>(counts);
  const int64_t size = counts.size(0);
  size_t bytes = 0;
  check_cuda(op, "sizing the scan of the rows",
             cub::DeviceScan::ExclusiveSum(nullptr, bytes, at, at, size, stream));
  // CUB takes a null workspace for a question about its size.
  const Tensor workspace =
      empty(counts, std::max<int64_t>(static_cast<int64_t>(bytes), 1), ScalarType::Byte);
  check_cuda(op, "scan of the rows",
             cub::DeviceScan::ExclusiveSum(workspace.data_ptr(), bytes, at, at, size, stream));
}

EncodeCsr new_csr(const char* op, const Tensor& offsets, int64_t capacity, bool gated,
                  cudaStream_t stream) {
  const EncodeCsr out = allocate_csr(offsets, capacity, gated);
  const PlaceHits p = csr_arguments({}, out);
  limit_offsets_kernel<<<place_blocks(p.tiles.n + 1), kPlaceThreads, 0, stream>>>(p);
  check_launch(op);
  return out;
}

void pad_csr(const char* op, const EncodeCsr& csr, cudaStream_t stream) {
  const PlaceHits p = csr_arguments({}, csr);
  if (p.capacity == 0) return;
  pad_kernel<<<place_blocks(p.capacity), kPlaceThreads, 0, stream>>>(p);
  check_launch(op);
}

void encode_tiles(const char* op, const EncodeTiles& p, Dtype dtype, Limit limit,
                  cudaStream_t stream) {
  if (p.n == 0 || p.last == p.first) return;
  if (uses_few(p, dtype, limit)) {
    check_cuda(op, "launch of the encoder's tiles (few)", encode_few(p, dtype, limit, stream));
  } else if (uses_sm90(p, dtype, limit)) {
    check_cuda(op, "launch of the encoder's tiles (sm_90a)", encode_sm90(p, dtype, limit, stream));
  } else if (is_small(p)) {
    encode_portable<SmallTile>(op, p, dtype, limit, stream);
  } else {
    encode_portable<LargeTile>(op, p, dtype, limit, stream);
  }
}

EncodeHits encode_hits(const char* op, const EncodeInputs& in, const EncodeLimit& limit,
                       int64_t arena, cudaStream_t stream) {
  EncodeHits hits;
  hits.inputs = in;
  hits.kind = limit.kind;
  const EncodeTiles& p = hits.tiles = tiles_of(in, limit.first, limit.last);
  hits.width = encode_width(p, in.dtype, limit.kind);
  start_state(op, hits, in, stream);
  set_limit(op, hits, in, limit, stream);
  allocate_outputs(hits, in, arena);
  encode_tiles(op, p, in.dtype, limit.kind, stream);
  scan_counts(op, hits, stream);
  return hits;
}

void encode_missing(const char* op, EncodeHits& hits, int64_t reserved, cudaStream_t stream) {
  EncodeTiles& p = hits.tiles;
  const int64_t begin = std::max(static_cast<int64_t>(p.arena) - kMaxRun, int64_t{0});
  hits.rest = empty(hits.offsets, reserved - begin, ScalarType::Long);
  p.rest = data<uint64_t>(hits.rest);
  p.rest_begin = static_cast<uint64_t>(begin);
  encode_tiles(op, p, hits.inputs.dtype, hits.kind, stream);
}

EncodeCsr place_hits(const char* op, EncodeHits& hits, int64_t capacity, bool exact,
                     cudaStream_t stream) {
  const bool gated = hits.kind == Limit::kPerLatent;
  if (capacity == 0) return new_csr(op, hits.offsets, capacity, gated, stream);
  const EncodeCsr out = exact ? allocate_csr(hits.offsets, capacity, gated)
                              : new_csr(op, hits.offsets, capacity, gated, stream);
  PlaceHits p = csr_arguments(place_arguments(hits), out);
  p.exact = exact;
  const int64_t runs = p.column_blocks * p.strips(), others = gated && !exact ? capacity : 0;
  place_kernel<<<place_blocks(std::max(runs * kRunLanes, others)), kPlaceThreads, 0, stream>>>(p);
  check_launch(op);
  return out;
}

EncodeCsr encode_candidates(const char* op, const EncodeInputs& in, const Tensor& bound,
                            int64_t first, int64_t last, int64_t capacity, cudaStream_t stream) {
  EncodeLimit limit;
  limit.kind = Limit::kPerToken;
  limit.values = torch::stable::contiguous(bound);
  limit.first = first;
  limit.last = last;
  return encode_candidates(op, in, limit, capacity, stream);
}

EncodeCsr encode_candidates(const char* op, const EncodeInputs& in, const EncodeLimit& limit,
                            int64_t capacity, cudaStream_t stream) {
  EncodeHits hits = encode_hits(op, in, limit, capacity, stream);
  return place_hits(op, hits, capacity, false, stream);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
