#include <torch/csrc/stable/ops.h>

#include "cuda/encode_few.h"
#include "cuda/runtime.h"
#include "cuda/topk_few.h"
#include "cuda/topk_few_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

// One allocation in place of seven.
class Workspace {
 public:
  explicit Workspace(const Tensor& like, int64_t bytes)
      : memory_(torch::stable::new_empty(like, {bytes}, ScalarType::Byte)),
        next_(data<char>(memory_)) {}

  // Room for `count` elements of 4 bytes, aligned to 256.
  template <typename T>
  T* take(int64_t count) {
    static_assert(sizeof(T) == 4, "see size_of");
    T* taken = reinterpret_cast<T*>(next_);
    next_ += size_of(count);
    return taken;
  }
  static int64_t size_of(int64_t count) { return (count * 4 + 255) / 256 * 256; }

 private:
  Tensor memory_;
  char* next_;
};

FillRows fill_arguments(const SelectRows& best, const int64_t* which, const TopkCsr& out) {
  FillRows p = {};
  p.latents = best.latents;
  p.values = best.values;
  p.counts = best.counts;
  p.n = best.n;
  p.k = best.k;
  p.which = which;
  p.offsets = data<int64_t>(out.offsets);
  p.out_latents = data<int32_t>(out.indices);
  p.out_values = data<float>(out.values);
  p.gate = data<float>(out.gate);
  return p;
}

}  // namespace

bool topk_few_serves(const EncodeInputs& in) {
  return in.n() > 0 && uses_few(tiles_of(in, 0, in.d_sae()), in.dtype, Limit::kPerToken);
}

void topk_few(const char* op, const EncodeInputs& in, int64_t k, const int64_t* which,
              const TopkCsr& out, cudaStream_t stream) {
  const EncodeTiles tiles = tiles_of(in, 0, in.d_sae());
  const int64_t n = in.n(), groups = (in.d_sae() + kGroup - 1) / kGroup;
  const auto size = &Workspace::size_of;
  Workspace workspace(
      in.bias, size(n * groups * kGroup) + 2 * size(n * groups) + 2 * size(n * k) + 2 * size(n));
  TopkFew p = {};
  p.of = {workspace.take<uint32_t>(n * groups * kGroup), workspace.take<uint32_t>(n * groups),
          groups};
  p.chosen = workspace.take<int32_t>(n * groups);
  p.best.n = n;
  p.best.k = k;
  p.best.latents = workspace.take<int32_t>(n * k);
  p.best.values = workspace.take<float>(n * k);
  p.best.counts = workspace.take<int32_t>(n);
  p.best.bound = workspace.take<float>(n);
  p.fill = fill_arguments(p.best, which, out);
  check_cuda(op, "launch of the encoder's tiles (few)", few_keys(tiles, in.dtype, p.of, stream));
  topk_few_kernel<kTopkFewKeys><<<static_cast<unsigned>(n), 32 * kTopkFewWarps, 0, stream>>>(p);
  check_launch(op);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
