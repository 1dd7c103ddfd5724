// The screened encoder's device code on the CPU: codes, bounds, candidates, rescoring, with the host code of
// cuda/encode_screened.cu in its shortest form. The int8 products are those of encode_sm90_kernel, or, as that is slow
// here, plain loops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda/encode_limit_kernel.cuh"
#include "cuda/encode_sm90_kernel.cuh"
#include "cuda/place_kernel.cuh"
#include "cuda/quantise_kernel.cuh"
#include "cuda/rescore_kernel.cuh"
#include "testing/registry.h"

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

Memory<float> padded_center(const Array<float>& center, int64_t width) {
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

// Of tokens (codes, scale, bound) or of latents (codes, scale, dot, number of latents that cannot be screened).
py::tuple quantise(const Array<float>& values, int dtype, int64_t stride,
                   const Array<float>& center, bool latents) {
  Given given(values, dtype, stride);
  const int64_t rows = given.rows.rows, width = screened_width(given.rows.cols);
  auto middle = padded_center(center, width);
  auto codes = new_array<int8_t>({rows, width});
  auto scale = new_array<float>({rows}), other = new_array<float>({rows});
  Memory<LatentCodes> found(rows);
  int32_t unscreened = 0;
  QuantiseRows p = {};
  p.rows = given.rows;
  p.center = middle.data();
  p.width = width;
  p.count = rows;
  p.codes = codes.mutable_data();
  if (!latents) {
    p.scale = scale.mutable_data();
    p.bound = other.mutable_data();
    run_quantise<false>(p);
    return py::make_tuple(codes, scale, other);
  }
  p.latents = found.data();
  p.unscreened = &unscreened;
  run_quantise<true>(p);
  for (int64_t j = 0; j < rows; ++j) {
    scale.mutable_data()[j] = found.data()[j].scale;
    other.mutable_data()[j] = found.data()[j].dot;
  }
  return py::make_tuple(codes, scale, other, unscreened);
}

// The codes of latents again, in place: those that step `step` has moved. Returns how many more cannot be screened.
int requantise(const Array<float>& values, int dtype, const Array<float>& center,
               py::array_t<int8_t>& codes, py::array_t<float>& scale, py::array_t<float>& dot,
               const Array<int64_t>& touched_at, int64_t step, int64_t tail) {
  Given given(values, dtype, values.shape(1));
  const int64_t rows = given.rows.rows, width = screened_width(given.rows.cols);
  auto middle = padded_center(center, width);
  Memory<LatentCodes> latents(rows);
  for (int64_t j = 0; j < rows; ++j) latents.data()[j] = {scale.at(j), dot.at(j)};
  int32_t unscreened = 0;
  QuantiseRows p = {};
  p.rows = given.rows;
  p.center = middle.data();
  p.width = width;
  p.count = rows;
  p.touched_at = touched_at.data();
  p.codes = codes.mutable_data();
  p.latents = latents.data();
  p.unscreened = &unscreened;
  p.step = step;
  p.tail = tail;
  run_quantise<true>(p);
  for (int64_t j = 0; j < rows; ++j) {
    scale.mutable_at(j) = latents.data()[j].scale;
    dot.mutable_at(j) = latents.data()[j].dot;
  }
  return unscreened;
}

// The strips that the matrix instructions would leave, a warp each.
constexpr int kColumns = 256;
__global__ void __launch_bounds__(32) products_kernel(EncodeTiles p) {
  __shared__ float2 limits[kColumns / 2];
  float* const limit = &limits[0].x;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kStripTokens;
  const int64_t latent0 = static_cast<int64_t>(blockIdx.y) * kColumns;
  for (int c = lane; c < kColumns && latent0 + c < p.d_sae; c += 32)
    limit[c] = p.limit[latent0 + c];
  __syncwarp();
  float acc[kColumns / 8][4];
  for (int m = 0; m < kColumns / 8; ++m) {
    for (int e = 0; e < 4; ++e) {
      const int64_t token = token0 + lane / 4 + 8 * (e / 2);
      const int64_t latent = latent0 + 8 * m + 2 * (lane % 4) + e % 2;
      int32_t sum = __float_as_int(kScreenZero);
      if (token < p.n && latent < p.d_sae) {
        const int8_t* x = static_cast<const int8_t*>(p.x) + token * p.x_stride;
        const int8_t* W = static_cast<const int8_t*>(p.W) + latent * p.W_stride;
        for (int64_t k = 0; k < p.d; ++k) sum += x[k] * W[k];
      }
      acc[m][e] = __int_as_float(sum);
    }
  }
  emit_strip<kColumns, Limit::kScreened>(p, acc, token0, latent0, blockIdx.y, lane, limit, limit);
}

// Two CTAs, two rows of tiles to a group.
void run_hopper(const EncodeTiles& p) {
  const Sm90Raster raster = {static_cast<uint32_t>((p.n + kSm90Tokens - 1) / kSm90Tokens),
                             static_cast<uint32_t>((p.last + kSm90Latents - 1) / kSm90Latents),
                             p.n > kSm90Tokens ? 2u : 1u};
  constexpr int kDepth = kSm90Depth<int8_t>;
  const CUtensorMap x = {p.x, 1, p.d, p.n, p.x_stride, kDepth, kSm90Tokens};
  const CUtensorMap W = {p.W, 1, p.d, p.last, p.W_stride, kDepth, kSm90Latents};
  cuda_on_cpu::launch<encode_sm90_kernel<int8_t, Limit::kScreened>>(
      std::min(2u, raster.rows * raster.columns), kSm90Threads, kSm90SharedBytes, x, W, p, raster);
}

void run_products(const EncodeTiles& p, bool hopper) {
  if (hopper) return run_hopper(p);
  const dim3 grid(static_cast<unsigned>((p.n + kStripTokens - 1) / kStripTokens),
                  static_cast<unsigned>((p.last + kColumns - 1) / kColumns));
  cuda_on_cpu::launch<products_kernel>(grid, 32, 0, p);
}

// Counts to offsets, in place of CUB's scan.
void sum_counts(int64_t* counts, int64_t size) {
  int64_t sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += std::exchange(counts[i], sum);
}

template <bool kWide>
void run_rescore(const Rescore& p) {
  cuda_on_cpu::launch<rescore_kernel<kWide>>(
      static_cast<unsigned>((p.count + kRescoreSpan - 1) / kRescoreSpan), kRescoreThreads,
      static_cast<size_t>(rescore_shared(p.x.cols, kWide)), p);
}

struct Screened {
  Given x, W;
  const Array<float>&bias, &threshold;
  float window;
  bool hopper;
  int64_t n = x.rows.rows, d_sae = W.rows.rows, width = screened_width(x.rows.cols);

  // Candidates: offsets [n + 1], indices.
  std::pair<std::vector<int64_t>, std::vector<int32_t>> candidates(
      const Array<float>& given_center) {
    auto center = padded_center(given_center, width);
    Memory<int8_t> x_codes(n * width), W_codes(d_sae * width);
    Memory<float> scale(n), bound(n), limit(d_sae);
    Memory<LatentCodes> latents(d_sae);
    int32_t unscreened = 0;
    QuantiseRows p = {x.rows,         center.data(), width,        n,       nullptr,
                      x_codes.data(), scale.data(),  bound.data(), nullptr, nullptr};
    run_quantise<false>(p);
    p = {W.rows,         center.data(), width,   d_sae,          nullptr,
         W_codes.data(), nullptr,       nullptr, latents.data(), &unscreened};
    run_quantise<true>(p);
    const unsigned blocks = static_cast<unsigned>(d_sae / kQuantiseThreads + 1);
    cuda_on_cpu::launch<encode_limit_kernel>(blocks, kLimitThreads, 0, bias.data(),
                                             threshold.data(), window, d_sae, limit.data());
    cuda_on_cpu::launch<screen_limit_kernel>(blocks, kQuantiseThreads, 0, latents.data(), d_sae,
                                             limit.data());
    PlaceHits h = {};
    EncodeTiles& t = h.tiles;
    t.x = x_codes.data();
    t.W = W_codes.data();
    t.n = n;
    t.d = t.x_stride = t.W_stride = width;
    t.d_sae = t.last = d_sae;
    t.scale = scale.data();
    t.bound = bound.data();
    t.limit = limit.data();
    h.width = kColumns;
    h.column_blocks = (d_sae + kColumns - 1) / kColumns;
    Memory<uint16_t> counts(h.column_blocks * h.tokens());
    Memory<uint64_t> runs(h.column_blocks * h.strips()), records(n * d_sae);
    Memory<uint32_t> bases(h.groups() * h.tokens());
    std::vector<int64_t> offsets(static_cast<size_t>(n) + 1);
    unsigned long long reserved = 0;
    t.counts = counts.data();
    t.runs = runs.data();
    t.records = records.data();
    t.arena = static_cast<uint64_t>(n * d_sae);
    t.needed = &reserved;
    run_products(t, hopper);
    h.bases = bases.data();
    h.offsets = offsets.data();
    cuda_on_cpu::launch<scan_counts_kernel>(2, kPlaceThreads, 0, h);
    cuda_on_cpu::launch<scan_groups_kernel>(2, kPlaceThreads, 0, h);
    sum_counts(offsets.data(), n + 1);
    int64_t needed = 0;
    h.needed = &needed;
    h.capacity = offsets.back();
    std::vector<int32_t> indices(static_cast<size_t>(h.capacity));
    std::vector<float> values(indices.size());
    h.indices = indices.data();
    h.values = values.data();
    cuda_on_cpu::launch<limit_offsets_kernel>(1, kPlaceThreads, 0, h);
    cuda_on_cpu::launch<place_kernel>(2, kPlaceThreads, 0, h);
    return {offsets, indices};
  }
};

// offsets, indices, values, gate, needed; candidates' offsets, indices and pre-activations.
py::tuple encode(const Array<float>& x, int x_dtype, int64_t x_stride, const Array<float>& W,
                 int W_dtype, int64_t W_stride, const Array<float>& bias,
                 const Array<float>& threshold, float window, const Array<float>& center,
                 int64_t max_nnz, bool hopper) {
  Screened s = {{x, x_dtype, x_stride}, {W, W_dtype, W_stride}, bias, threshold, window, hopper};
  if (!s.W.rows.wide) throw py::value_error("W is not wide");
  const auto [offsets, indices] = s.candidates(center);
  auto pre = new_array<float>({static_cast<py::ssize_t>(indices.size())});
  Rescore r = {s.x.rows,       s.W.rows,           bias.data(), offsets.data(),
               indices.data(), pre.mutable_data(), pre.size()};
  if (r.count > 0) W_dtype == kFloat32 ? run_rescore<true>(r) : run_rescore<false>(r);
  auto kept = new_array<int64_t>({s.n + 1});
  int64_t needed = 0;
  KeepEntries k = {};
  k.offsets = offsets.data();
  k.indices = indices.data();
  k.values = pre.data();
  k.threshold = threshold.data();
  k.window = window;
  k.n = s.n;
  k.kept_offsets = kept.mutable_data();
  k.needed = &needed;
  cuda_on_cpu::launch<count_kept_kernel>(2, kRescoreThreads, 0, k);
  sum_counts(k.kept_offsets, s.n + 1);
  k.capacity = max_nnz < 0 ? k.kept_offsets[s.n] : max_nnz;
  auto kept_indices = new_array<int32_t>({k.capacity});
  auto kept_values = new_array<float>({k.capacity}), gate = new_array<float>({k.capacity});
  k.kept_indices = kept_indices.mutable_data();
  k.kept_values = kept_values.mutable_data();
  k.kept_gate = gate.mutable_data();
  PlaceHits rest = {};
  rest.tiles.n = s.n;
  rest.offsets = k.kept_offsets;
  rest.needed = &needed;
  rest.capacity = k.capacity;
  rest.indices = k.kept_indices;
  rest.values = k.kept_values;
  rest.gate = k.kept_gate;
  cuda_on_cpu::launch<limit_offsets_kernel>(1, kPlaceThreads, 0, rest);
  cuda_on_cpu::launch<keep_kernel>(2, kRescoreThreads, 0, k);
  cuda_on_cpu::launch<pad_kernel>(1, kPlaceThreads, 0, rest);
  return py::make_tuple(kept, kept_indices, kept_values, gate, needed,
                        py::array_t<int64_t>(s.n + 1, offsets.data()),
                        py::array_t<int32_t>(pre.size(), indices.data()), pre);
}

const BindLater later([](py::module_& module) {
  py::module_ m = module.def_submodule("cuda_screened");
  m.attr("kappa") = kScreenKappa;
  m.attr("zero") = kScreenZero;
  m.def("quantise", &quantise, py::arg("values"), py::arg("dtype"), py::arg("stride"),
        py::arg("center"), py::arg("latents"));
  m.def("requantise", &requantise, py::arg("values"), py::arg("dtype"), py::arg("center"),
        py::arg("codes").noconvert(), py::arg("scale").noconvert(), py::arg("dot").noconvert(),
        py::arg("touched_at"), py::arg("step"), py::arg("tail"));
  m.def("encode", &encode, py::arg("x"), py::arg("x_dtype"), py::arg("x_stride"), py::arg("W"),
        py::arg("W_dtype"), py::arg("W_stride"), py::arg("bias"), py::arg("threshold"),
        py::arg("window"), py::arg("center"), py::arg("max_nnz"), py::arg("hopper"));
});

}  // namespace
}  // namespace gemmascope_fast
