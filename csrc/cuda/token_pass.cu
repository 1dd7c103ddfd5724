// Launches of the passes in token order.
//
// A matrix whose columns are not adjacent is copied part by part when the entries would read more than a copy moves: an
// element by itself costs a sector of 32 bytes.
#include "cuda/entry_dots_kernel.cuh"
#include "cuda/token_pass.h"
#include "cuda/token_pass_kernel.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
constexpr int64_t kCopyElements = int64_t{1} << 26;  // of a part: 128 MiB in 16 bits

// Calls run(first column, part of the matrix) for parts that are fast to gather from.
template <class Run>
void for_column_parts(const Tensor& matrix, int64_t capacity, const Run& run) {
  const int64_t features = matrix.size(0), d = matrix.size(1);
  const int64_t size = static_cast<int64_t>(matrix.element_size());
  if (matrix.stride(1) == 1 || 32 * capacity <= 2 * features * size) {
    run(int64_t{0}, matrix);
    return;
  }
  const int64_t fitting = kCopyElements / std::max<int64_t>(features, 1) / kChunk * kChunk;
  const int64_t width = std::max<int64_t>(fitting, 64);
  Tensor whole = matrix;
  for (int64_t begin = 0; begin < d; begin += width) {
    const int64_t cols = std::min(width, d - begin);
    run(begin, torch::stable::contiguous(torch::stable::narrow(whole, 1, begin, cols)));
  }
}

template <Access access>
void launch_tokens(const char* op, const TokenPass& p, cudaStream_t stream) {
  const int64_t items = token_pass_items(p, access);
  if (items == 0) return;
  token_pass_kernel<access>
      <<<static_cast<unsigned>(std::min(items, kMaxBlocks)), kTokenThreads, 0, stream>>>(p);
  check_launch(op);
}

}  // namespace

void sum_tokens_cuda(const char* op, const TokenSum& sum, const Tensor& out) {
  const cudaStream_t stream = current_stream(op, out);
  const DeviceEntries& entries = *sum.entries;
  TokenPass p;
  p.offsets = entries.offsets_data();
  p.indices = entries.indices_data();
  p.coefficients = sum.coefficients;
  p.gate = sum.gate;
  p.n = out.size(0);
  p.sets = p.n == 0 ? 0 : entries.n / p.n;
  p.capacity = entries.capacity;
  p.add = sum.add ? 1 : 0;
  for_column_parts(sum.matrix, entries.capacity, [&](int64_t begin, const Tensor& part) {
    p.matrix = rows_of(part);
    p.bias = sum.bias == nullptr ? nullptr : sum.bias + begin;
    p.out = columns_of(target_of(out), begin, part.size(1));
    if (!p.matrix.wide) {
      launch_tokens<Access::kAny>(op, p, stream);
    } else if (p.matrix.dtype == kFloat32) {
      launch_tokens<Access::k32>(op, p, stream);
    } else {
      launch_tokens<Access::k16>(op, p, stream);
    }
  });
}

Tensor dot_tokens_cuda(const char* op, const DeviceEntries& entries, const Tensor& W,
                       const Tensor& g) {
  Tensor out = new_floats(entries.offsets, entries.capacity);
  if (entries.capacity == 0) return out;
  const Tensor W_rows = adjacent_columns(W), g_rows = adjacent_columns(g);
  EntryDots p;
  p.offsets = entries.offsets_data();
  p.indices = entries.indices_data();
  p.n = entries.n;
  p.capacity = entries.capacity;
  p.W = rows_of(W_rows);
  p.g = rows_of(g_rows);
  p.out = mutable_floats(out);
  entry_dots_kernel<<<pair_blocks(p.capacity), kPairThreads, 0, current_stream(op, out)>>>(p);
  check_launch(op);
  return out;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
