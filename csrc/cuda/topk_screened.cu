// Host side of the screened TopK encoder.
//
//   what pre can be at most, the largest of each row   upper_bounds.h, topk_scan.h
//   those -> pre-activations -> the k best             topk_screened_kernel.cuh
//
// Bound by the int8 products, 2 n d_in d_sae operations, and 2 d_in bytes per pre-activation.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cuda/operands.h"
#include "cuda/runtime.h"
#include "cuda/shared_limit.h"
#include "cuda/topk_screened.h"
#include "cuda/topk_screened_kernel.cuh"
#include "cuda/upper_bounds.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

// The plain encoder takes one row in so many, and all rows where more are unsure.
constexpr int64_t kUnsurePart = 8;
constexpr int64_t kGrid = int64_t{1} << 16;

unsigned grid_for(int64_t items) {
  return static_cast<unsigned>(std::clamp(items, int64_t{1}, kGrid));
}

struct Call {
  const char* op;
  cudaStream_t stream;
  const Tensor &x, &W_enc, &bias;
  ScreenedEncoder packed;
  int64_t n = x.size(0), d_sae = W_enc.size(1);
};

const char* why_not(const Tensor& x, const Tensor& W_enc, int64_t k, cudaStream_t stream) {
  if (const char* why = why_not_now(x, W_enc, stream)) return why;
  const int64_t d_sae = W_enc.size(1);
  if (screened_room(k, d_sae) > kMostScreenedRoom) return "k is above 1008";
  if (screening_is("always")) return nullptr;
  if (x.size(0) <= kFewRows) return "there are few tokens";
  // About 3 k / 2 pre-activations are computed per row.
  return 3 * k * kElementsPerCandidate / 2 > d_sae ? "d_sae is small for this k" : nullptr;
}

struct Screen {
  UpperBounds uppers;
  TopkRows kept;  // by what pre can be at most
  TopkRows best;  // by pre
  Tensor unsure;  // [n]
  Tensor sizes;   // [2]

  Screen(const Call& call, int64_t k, const Tensor& bytes)
      : uppers(call.op, call.x, call.bias, call.packed, bytes, call.stream),
        kept(call.bias, call.n, call.d_sae, screened_room(k, call.d_sae)),
        best(call.bias, call.n, call.d_sae, k),
        unsure(torch::stable::new_empty(call.bias, {call.n}, ScalarType::Long)),
        sizes(torch::stable::new_empty(call.bias, {2}, ScalarType::Long)) {}

  Candidates candidates(const Call& call) const {
    return [this, &call](int64_t begin, int64_t rows, Prefix chunk, int64_t capacity) {
      const Tensor least = tokens_of(kept.bound, begin, rows);
      return uppers.candidates(call.op, begin, least, chunk, capacity, call.stream);
    };
  }
};

DecideRows decide_arguments(const Call& call, const Screen& screen) {
  DecideRows p = {};
  p.x = rows_of(call.x);
  p.W = rows_of(features(call.W_enc));
  p.bias = data<float>(call.bias);
  p.scale = data<float>(screen.uppers.given.scale);
  p.room = screen.kept.k;
  p.latents = data<int32_t>(screen.kept.latents);
  p.uppers = data<float>(screen.kept.values);
  p.counts = data<int32_t>(screen.kept.counts);
  p.bound = data<float>(screen.kept.bound);
  p.to.n = call.n;
  p.to.k = screen.best.k;
  p.to.latents = data<int32_t>(screen.best.latents);
  p.to.values = data<float>(screen.best.values);
  p.to.counts = data<int32_t>(screen.best.counts);
  p.to.bound = data<float>(screen.best.bound);
  p.unsure = data<int64_t>(screen.unsure);
  p.sizes = data<unsigned long long>(screen.sizes);
  return p;
}

// The k best of what was kept, to `out`.
void decide(const Call& call, const Screen& screen, const TopkCsr& out) {
  DecideRows p = decide_arguments(call, screen);
  check_cuda(call.op, "clearing sizes", cudaMemsetAsync(p.sizes, 0, 16, call.stream));
  const bool wide = p.W.dtype == kFloat32;
  const int shared = static_cast<int>(decide_shared(p.x.cols, wide, p.room));
  const void* kernel = wide ? reinterpret_cast<const void*>(&decide_rows_kernel<true>)
                            : reinterpret_cast<const void*>(&decide_rows_kernel<false>);
  check_cuda(call.op, "shared memory of the decisions",
             raise_shared_limit(kernel, kScreenedOwnShared));
  void* arguments[] = {&p};
  check_cuda(call.op, "launch of the decisions",
             cudaLaunchKernel(kernel, dim3(grid_for(call.n)), dim3(kRescoreThreads), arguments,
                              static_cast<size_t>(shared), call.stream));
  fill_rows(call.op, screen.best, nullptr, out, call.stream);
}

struct Seen {
  std::vector<int64_t> lost;
  int64_t unsure, decided;
  ScreenedHeader header;
};

// Waits for the device.
Seen look(const Call& call, const Screen& screen) {
  Seen seen = {};
  seen.lost.resize(static_cast<size_t>(screen.kept.blocks()));
  int64_t sizes[2] = {0, 0};
  Readback found(call.op, call.stream);
  found.read(seen.lost.data(), screen.kept.lost.data_ptr(), seen.lost.size() * sizeof(int64_t));
  found.read(sizes, screen.sizes.data_ptr(), sizeof(sizes));
  found.read(&seen.header, call.packed.header(), sizeof(ScreenedHeader));
  found.wait();
  check_header(call.op, call.packed, seen.header);
  seen.unsure = sizes[0];
  seen.decided = sizes[1];
  return seen;
}

}  // namespace

std::optional<UnsureRows> topk_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                        const Tensor& bias, int64_t k, const Tensor& bytes,
                                        const TopkCsr& out, cudaStream_t stream) {
  if (const char* why = why_not(x, W_enc, k, stream)) {
    report_screened(op, x, W_enc, why, {}, 0);
    return std::nullopt;
  }
  const Call call = {op, stream, x, W_enc, bias, screened_encoder(op, bytes, W_enc)};
  const Screen screen(call, k, bytes);
  const Candidates candidates = screen.candidates(call);
  scan_prefixes(op, screen.kept, candidates, stream);
  decide(call, screen, out);
  Seen seen = look(call, screen);
  if (scan_lost(op, screen.kept, seen.lost, candidates, stream)) {
    decide(call, screen, out);
    seen = look(call, screen);
  }
  const bool few = seen.unsure * kUnsurePart <= call.n || screening_is("always");
  report_screened(op, x, W_enc, few ? nullptr : "int8 codes leave too many rows undecided",
                  seen.header, seen.decided);
  if (!few) return std::nullopt;
  return UnsureRows{screen.unsure, seen.unsure};
}

EncodeInputs gather_rows(const char* op, const EncodeInputs& in, const UnsureRows& rows,
                         cudaStream_t stream) {
  const int64_t d = in.x.size(1), per_word = in.dtype == Dtype::kFloat32 ? 4 : 8;
  EncodeInputs made = in;
  made.x = torch::stable::new_empty(in.x, {rows.count, d}, in.x.scalar_type());
  gather_rows_kernel<<<grid_for(rows.count), kRescoreThreads, 0, stream>>>(
      data<uint4>(in.x), in.x.stride(0) / per_word, data<int64_t>(rows.which), rows.count,
      d / per_word, data<uint4>(made.x));
  check_launch(op);
  return made;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
