// What the tests of the screened encoders share: matrices, codes, and the entries that int8 products let through, as CSR.
// The products are those of encode_sm90_kernel, or, as that is slow here, plain loops.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/encode_sm90_kernel.cuh"
#include "cuda/place_kernel.cuh"
#include "cuda/quantise_kernel.cuh"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Full of 0xAB, as memory that an allocator hands out is full of anything.
template <class T>
py::array_t<T> new_array(std::vector<py::ssize_t> shape) {
  py::array_t<T> result(std::move(shape));
  memset(static_cast<void*>(result.mutable_data()), 0xAB, static_cast<size_t>(result.nbytes()));
  return result;
}
template <class T>
struct Memory {  // aligned to 16 bytes
  std::vector<uint4> words;
  explicit Memory(int64_t size) : words(static_cast<size_t>(size) * sizeof(T) / 16 + 1) {
    memset(static_cast<void*>(words.data()), 0xAB, words.size() * 16);
  }
  T* data() { return reinterpret_cast<T*>(words.data()); }
};

// A matrix of one of the dtypes with rows a stride apart, NaN between them.
struct Given {
  Memory<char> memory;
  Rows rows;

  Given(const Array<float>& from, int dtype, int64_t stride)
      : memory(from.shape(0) * stride * (dtype == kFloat32 ? 4 : 2)) {
    const int64_t n = from.shape(0), d = from.shape(1);
    if (stride < d) throw py::value_error("stride");
    memset(memory.data(), 0xFF, memory.words.size() * 16);
    rows = {memory.data(), n, d, stride, 1, dtype, 0};
    rows.wide = rows_are_wide(rows.data, dtype, d, stride, 1);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < d; ++k)
        store_element(memory.data(), dtype, i * stride + k, from.at(i, k));
    }
  }
};

inline Memory<float> padded_center(const Array<float>& center, int64_t width) {
  Memory<float> result(width);
  std::fill_n(result.data(), width, 0.0f);
  std::copy_n(center.data(), std::min<int64_t>(center.size(), width), result.data());
  return result;
}

template <bool kLatents>
void run_quantise(const QuantiseRows& p) {
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(p.count, 1, 3));
  cuda_on_cpu::launch<quantise_kernel<kLatents>>(blocks, kQuantiseThreads,
                                                 static_cast<size_t>(p.width) * 4, p);
}

// The strips that the matrix instructions would leave, a warp each.
constexpr int kColumns = 256;
template <Limit kLimit>
__global__ void __launch_bounds__(32) products_kernel(EncodeTiles p) {
  __shared__ float2 limits[kColumns / 2], biases[kColumns / 2];
  float *const limit = &limits[0].x, *const bias = &biases[0].x;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kStripTokens;
  const int64_t latent0 = p.first + static_cast<int64_t>(blockIdx.y) * kColumns;
  for (int c = lane; c < kColumns && latent0 + c < p.last; c += 32) {
    limit[c] = p.limit[latent0 + c];
    bias[c] = kLimit == Limit::kUpperBound ? p.bias[latent0 + c] : 0.0f;
  }
  __syncwarp();
  float acc[kColumns / 8][4];
  for (int m = 0; m < kColumns / 8; ++m) {
    for (int e = 0; e < 4; ++e) {
      const int64_t token = token0 + lane / 4 + 8 * (e / 2);
      const int64_t latent = latent0 + 8 * m + 2 * (lane % 4) + e % 2;
      int32_t sum = __float_as_int(kScreenZero);
      if (token < p.n && latent < p.last) {
        const int8_t* x = static_cast<const int8_t*>(p.x) + token * p.x_stride;
        const int8_t* W = static_cast<const int8_t*>(p.W) + latent * p.W_stride;
        for (int64_t k = 0; k < p.d; ++k) sum += x[k] * W[k];
      }
      acc[m][e] = __int_as_float(sum);
    }
  }
  emit_strip_of_few<kColumns, kLimit>(p, acc, token0, latent0, blockIdx.y, lane, bias, limit);
}

// Two CTAs, two rows of tiles to a group.
template <Limit kLimit>
void run_hopper(const EncodeTiles& p) {
  const Sm90Raster raster = {
      static_cast<uint32_t>((p.n + kSm90Tokens - 1) / kSm90Tokens),
      static_cast<uint32_t>((p.last - p.first + kSm90Latents - 1) / kSm90Latents),
      p.n > kSm90Tokens ? 2u : 1u};
  constexpr int kDepth = kSm90Depth<int8_t>;
  const CUtensorMap x = {p.x, 1, p.d, p.n, p.x_stride, kDepth, kSm90Tokens};
  const CUtensorMap W = {p.W, 1, p.d, p.last, p.W_stride, kDepth, kSm90Latents};
  cuda_on_cpu::launch<encode_sm90_kernel<int8_t, kLimit>>(
      std::min(2u, raster.rows * raster.columns), kSm90Threads, kSm90SharedBytes, x, W, p, raster);
}

template <Limit kLimit>
void run_products(const EncodeTiles& p, bool hopper) {
  if (hopper) return run_hopper<kLimit>(p);
  const dim3 grid(static_cast<unsigned>((p.n + kStripTokens - 1) / kStripTokens),
                  static_cast<unsigned>((p.last - p.first + kColumns - 1) / kColumns));
  cuda_on_cpu::launch<products_kernel<kLimit>>(grid, 32, 0, p);
}

// Counts to offsets, in place of CUB's scan.
inline void sum_counts(int64_t* counts, int64_t size) {
  int64_t sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += std::exchange(counts[i], sum);
}

struct Entries {
  std::vector<int64_t> offsets;
  std::vector<int32_t> indices;
  std::vector<float> values;
  int64_t needed;
};

// Of latents [t.first, t.last) with room for `capacity` entries.
template <Limit kLimit>
Entries entries_of(EncodeTiles t, int64_t capacity, bool hopper) {
  PlaceHits h = {};
  h.tiles = t;
  h.width = kColumns;
  h.column_blocks = (t.last - t.first + kColumns - 1) / kColumns;
  Memory<uint16_t> counts(h.column_blocks * h.tokens());
  Memory<uint64_t> runs(h.column_blocks * h.strips()), records(capacity);
  Memory<uint32_t> bases(h.groups() * h.tokens());
  Entries found;
  found.offsets.resize(static_cast<size_t>(t.n) + 1);
  unsigned long long reserved = 0;
  h.tiles.counts = counts.data();
  h.tiles.runs = runs.data();
  h.tiles.records = records.data();
  h.tiles.arena = static_cast<uint64_t>(capacity);
  h.tiles.needed = &reserved;
  run_products<kLimit>(h.tiles, hopper);
  h.bases = bases.data();
  h.offsets = found.offsets.data();
  cuda_on_cpu::launch<scan_counts_kernel>(2, kPlaceThreads, 0, h);
  cuda_on_cpu::launch<scan_groups_kernel>(2, kPlaceThreads, 0, h);
  sum_counts(h.offsets, t.n + 1);
  h.needed = &found.needed;
  h.capacity = capacity;
  found.indices.resize(static_cast<size_t>(capacity));
  found.values.resize(found.indices.size());
  h.indices = found.indices.data();
  h.values = found.values.data();
  cuda_on_cpu::launch<limit_offsets_kernel>(1, kPlaceThreads, 0, h);
  cuda_on_cpu::launch<place_kernel>(2, kPlaceThreads, 0, h);
  if (found.needed < capacity) {
    found.indices.resize(static_cast<size_t>(found.needed));
    found.values.resize(found.indices.size());
  }
  return found;
}

}  // namespace
}  // namespace gemmascope_fast
