// The encoder's device code on the CPU: limits, tiles or given sums, and placement, with the host code of
// cuda/encode_tiles.cu in its shortest form.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda/encode_few_kernel.cuh"
#include "cuda/encode_limit_kernel.cuh"
#include "cuda/encode_sm90_kernel.cuh"
#include "cuda/encode_tile_kernel.cuh"
#include "cuda/place_kernel.cuh"
#include "cuda/topk_few_kernel.cuh"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Full of 0xAB, as memory that an allocator hands out is full of anything.
template <class T>
std::vector<T> unwritten(int64_t size) {
  std::vector<T> result(static_cast<size_t>(size));
  if (size > 0) memset(static_cast<void*>(result.data()), 0xAB, sizeof(T) * result.size());
  return result;
}

template <class T>
py::array_t<T> new_array(int64_t size) {
  py::array_t<T> result(static_cast<py::ssize_t>(size));
  memset(static_cast<void*>(result.mutable_data()), 0xAB, static_cast<size_t>(result.nbytes()));
  return result;
}

// Rows of T with 16 bytes' worth of zeros at most behind d, and NaN between a row's end and its stride.
template <class T>
struct Rows {
  std::vector<uint4> memory;
  int64_t d, stride;

  explicit Rows(const Array<float>& from) {
    const int64_t rows = from.shape(0), width = from.shape(1), line = 16 / sizeof(T);
    d = std::max((width + line - 1) / line, int64_t{1}) * line;
    stride = d + 2 * line;
    memory.resize(static_cast<size_t>(rows * stride / line));
    T* to = reinterpret_cast<T*>(memory.data());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < stride; ++k) {
        const float padding = k < d ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        to[i * stride + k] = T(k < width ? from.at(i, k) : padding);
      }
    }
  }
};

template <class T, class Shape>
void run_tiles(const EncodeTiles& p, Limit limit) {
  const unsigned tiles = static_cast<unsigned>(tile_rows<Shape>(p) * tile_columns<Shape>(p));
  if (limit == Limit::kPerLatent) {
    cuda_on_cpu::launch<encode_tile_kernel<T, Limit::kPerLatent, Shape>>(tiles, Shape::kThreads,
                                                                         Shape::kShared, p);
  } else {
    cuda_on_cpu::launch<encode_tile_kernel<T, Limit::kPerToken, Shape>>(tiles, Shape::kThreads,
                                                                        Shape::kShared, p);
  }
}

template <class T>
void run_few(const EncodeTiles& p, Limit limit) {
  EncodeTiles own = p;
  own.limit = nullptr;
  const unsigned blocks = static_cast<unsigned>((p.last - p.first + kFewLatents - 1) / kFewLatents);
  if (limit == Limit::kPerLatent) {
    cuda_on_cpu::launch<encode_few_kernel<T, Limit::kPerLatent>>(blocks, kFewThreads, kFewShared,
                                                                 own);
  } else {
    cuda_on_cpu::launch<encode_few_kernel<T, Limit::kPerToken>>(blocks, kFewThreads, kFewShared,
                                                                own);
  }
}

// Two CTAs, two rows of tiles to a group.
template <class T>
void run_sm90(const EncodeTiles& p, Limit limit) {
  const Sm90Raster raster = {static_cast<uint32_t>((p.n + kSm90Tokens - 1) / kSm90Tokens),
                             static_cast<uint32_t>((p.last - p.first + 255) / kSm90Latents),
                             p.n > kSm90Tokens ? 2u : 1u};
  const CUtensorMap x = {p.x, 2, p.d, p.n, p.x_stride, kSm90Depth<T>, kSm90Tokens};
  const CUtensorMap W = {p.W, 2, p.d, p.last, p.W_stride, kSm90Depth<T>, kSm90Latents};
  const unsigned ctas = std::min(2u, raster.rows * raster.columns);
  if (limit == Limit::kPerLatent) {
    cuda_on_cpu::launch<encode_sm90_kernel<T, Limit::kPerLatent>>(
        ctas, kSm90Threads, kSm90SharedBytes, x, W, p, raster);
  } else {
    cuda_on_cpu::launch<encode_sm90_kernel<T, Limit::kPerToken>>(ctas, kSm90Threads,
                                                                 kSm90SharedBytes, x, W, p, raster);
  }
}

// A kernel whose product is given: sums [n, d_sae], NaN outside. One warp per strip.
template <int kColumns, Limit kLimit>
__global__ void __launch_bounds__(64) given_sums_kernel(EncodeTiles p, const float* sums) {
  __shared__ float2 pairs[kColumns];  // for the alignment
  float* const bias = &pairs[0].x;
  float* const limit = bias + kColumns;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t latent0 = p.first + static_cast<int64_t>(blockIdx.y) * kColumns;
  for (int c = static_cast<int>(threadIdx.x); c < kColumns && latent0 + c < p.d_sae; c += 64) {
    bias[c] = p.bias[latent0 + c];
    if (kLimit == Limit::kPerLatent) limit[c] = p.limit[latent0 + c];
  }
  __syncthreads();
  const int64_t token0 = (static_cast<int64_t>(blockIdx.x) * 2 + threadIdx.x / 32) * kStripTokens;
  float acc[kColumns / 8][4];
  for (int m = 0; m < kColumns / 8; ++m) {
    for (int e = 0; e < 4; ++e) {
      const int64_t token = token0 + lane / 4 + 8 * (e / 2);
      const int64_t latent = latent0 + 8 * m + 2 * (lane % 4) + e % 2;
      const bool inside = token < p.n && latent < p.d_sae;
      acc[m][e] = inside ? sums[token * p.d_sae + latent] : NAN;
    }
  }
  emit_strip<kColumns, kLimit>(p, acc, token0, latent0, blockIdx.y, lane, bias, limit);
}

template <int kColumns>
void run_given(const EncodeTiles& p, Limit limit, const float* sums) {
  const dim3 grid(static_cast<unsigned>((p.n + 31) / 32),
                  static_cast<unsigned>((p.last - p.first + kColumns - 1) / kColumns));
  if (limit == Limit::kPerLatent) {
    cuda_on_cpu::launch<given_sums_kernel<kColumns, Limit::kPerLatent>>(grid, 64, 0, p, sums);
  } else {
    cuda_on_cpu::launch<given_sums_kernel<kColumns, Limit::kPerToken>>(grid, 64, 0, p, sums);
  }
}

Array<float> encode_limits(const Array<float>& bias, const Array<float>& threshold, float window) {
  auto limit = new_array<float>(bias.size());
  const unsigned blocks = static_cast<unsigned>((bias.size() + kLimitThreads) / kLimitThreads);
  cuda_on_cpu::launch<encode_limit_kernel>(blocks, kLimitThreads, 0, bias.data(), threshold.data(),
                                           window, bias.size(), limit.mutable_data());
  return limit;
}

// What encode_hits and encode_missing of cuda/encode_tiles.cu do, and the memory that they allocate.
struct Hits {
  PlaceHits p = {};
  std::vector<uint4> counts, bases;  // of 16 bytes, for the alignment
  std::vector<uint64_t> runs, records, rest;
  std::vector<int32_t> invalid;
  std::vector<int64_t> offsets;
  unsigned long long reserved = 0;

  void allocate(int64_t arena) {
    EncodeTiles& t = p.tiles;
    p.column_blocks = (t.last - t.first + p.width - 1) / p.width;
    counts = unwritten<uint4>(p.column_blocks * p.tokens() / 8);
    bases = unwritten<uint4>(p.groups() * p.tokens() / 4);
    runs = unwritten<uint64_t>(p.column_blocks * p.strips());
    records = unwritten<uint64_t>(arena);
    offsets = unwritten<int64_t>(t.n + 1);
    invalid.assign(static_cast<size_t>(t.n), 0);
    t.counts = reinterpret_cast<uint16_t*>(counts.data());
    t.runs = runs.data();
    t.records = records.data();
    t.arena = static_cast<uint64_t>(arena);
    t.needed = &reserved;
    p.bases = reinterpret_cast<uint32_t*>(bases.data());
    p.offsets = offsets.data();
  }

  void scan() {
    if (p.tiles.n <= kStripTokens) {
      cuda_on_cpu::launch<scan_few_kernel>(1, kPlaceThreads, 0, p);
      return;
    }
    const unsigned blocks = std::min(place_blocks(p.groups() * p.tokens() / 2), 2u);
    cuda_on_cpu::launch<scan_counts_kernel>(blocks, kPlaceThreads, 0, p);
    cuda_on_cpu::launch<scan_groups_kernel>(1, kPlaceThreads, 0, p);
    int64_t sum = 0;  // in place of CUB's scan
    for (int64_t& offset : offsets) sum += std::exchange(offset, sum);
  }

  template <class Tiles>
  void complete(const Tiles& tiles) {
    EncodeTiles& t = p.tiles;
    if (reserved <= t.arena) return;
    t.rest_begin =
        static_cast<uint64_t>(std::max(static_cast<int64_t>(t.arena) - kMaxRun, int64_t{0}));
    rest = unwritten<uint64_t>(static_cast<int64_t>(reserved - t.rest_begin));
    t.rest = rest.data();
    tiles(t);
  }

  // offsets, indices, values, gate, needed, reserved.
  py::tuple place(int64_t capacity, bool exact, bool gated) {
    auto indices = new_array<int32_t>(capacity);
    auto values = new_array<float>(capacity), gate = new_array<float>(capacity);
    int64_t needed = -1;
    p.needed = &needed;
    p.capacity = capacity;
    p.indices = indices.mutable_data();
    p.values = values.mutable_data();
    p.gate = gated ? gate.mutable_data() : nullptr;
    p.exact = exact && capacity > 0;
    if (!p.exact) cuda_on_cpu::launch<limit_offsets_kernel>(1, kPlaceThreads, 0, p);
    cuda_on_cpu::launch<place_kernel>(2, kPlaceThreads, 0, p);
    py::array_t<int64_t> out(static_cast<py::ssize_t>(offsets.size()), offsets.data());
    return py::make_tuple(out, indices, values, gate, needed, reserved);
  }
};

struct Selection {
  Array<float> bias, values, limit;
  Limit kind;
  float window;
  int64_t first, last, arena, capacity;  // capacity: -1 for that of the result
};

Selection selection(const Array<float>& bias, const Array<float>& values, bool per_token,
                    float window, std::pair<int64_t, int64_t> range, int64_t arena,
                    int64_t capacity) {
  Selection s = {bias,        values,       {},    Limit::kPerToken, window,
                 range.first, range.second, arena, capacity};
  if (per_token) return s;
  s.kind = Limit::kPerLatent;
  s.limit = encode_limits(bias, values, window);
  return s;
}

template <class Tiles>
py::tuple encode(const Selection& s, EncodeTiles t, int width, const Tiles& tiles) {
  Hits hits;
  t.first = s.first;
  t.last = s.last;
  t.bias = s.bias.data();
  t.window = s.window;
  hits.p.tiles = t;
  hits.p.width = width;
  hits.allocate(s.arena);
  EncodeTiles& own = hits.p.tiles;
  if (s.kind == Limit::kPerToken) {
    own.bound = s.values.data();
  } else {
    own.threshold = s.values.data();
    own.limit = s.limit.data();
    own.invalid = hits.invalid.data();
  }
  if (own.n > 0 && own.last > own.first) tiles(own);
  hits.scan();
  if (s.capacity < 0) hits.complete(tiles);
  const bool exact = s.capacity < 0;
  return hits.place(exact ? hits.offsets.back() : s.capacity, exact, s.kind == Limit::kPerLatent);
}

template <class T>
EncodeTiles operands(const Rows<T>& x, int64_t n, const Rows<T>& W, int64_t d_sae) {
  EncodeTiles t = {};
  t.x = x.memory.data();
  t.W = W.memory.data();
  t.n = n;
  t.d = x.d;
  t.d_sae = d_sae;
  t.x_stride = x.stride;
  t.W_stride = W.stride;
  return t;
}

template <class T>
py::tuple encode_product(const Array<float>& x, const Array<float>& W, const Selection& s,
                         void (*run)(const EncodeTiles&, Limit), int width) {
  const Rows<T> rows(x), latents(W);
  const EncodeTiles t = operands(rows, x.shape(0), latents, W.shape(0));
  return encode(s, t, width, [&](const EncodeTiles& p) { run(p, s.kind); });
}

// keys [n, groups, 32] and highest [n, groups] of x W^T + bias.
template <class T>
py::tuple keys_of(const Array<float>& x, const Array<float>& W, const Array<float>& bias) {
  const Rows<T> rows(x), latents(W);
  EncodeTiles t = operands(rows, x.shape(0), latents, W.shape(0));
  t.last = t.d_sae;
  t.bias = bias.data();
  const int64_t groups = (t.d_sae + kGroup - 1) / kGroup;
  auto keys = new_array<uint32_t>(t.n * groups * kGroup),
       highest = new_array<uint32_t>(t.n * groups);
  const FewKeys out = {keys.mutable_data(), highest.mutable_data(), groups};
  const unsigned blocks = static_cast<unsigned>((t.d_sae + kFewLatents - 1) / kFewLatents);
  cuda_on_cpu::launch<few_keys_kernel<T>>(blocks, kFewThreads, kFewShared, t, out);
  return py::make_tuple(keys.reshape({t.n, groups * kGroup}), highest.reshape({t.n, groups}));
}

py::tuple few_keys(const Array<float>& x, const Array<float>& W, const std::string& dtype,
                   const Array<float>& bias) {
  if (dtype == "float16") return keys_of<__half>(x, W, bias);
  return keys_of<__nv_bfloat16>(x, W, bias);
}

template <class T>
py::tuple encode_tiled(const Array<float>& x, const Array<float>& W, const Selection& s,
                       const std::string& tile) {
  if constexpr (sizeof(T) == 2) {
    if (tile == ":few") return encode_product<T>(x, W, s, &run_few<T>, kFewWidth);
  }
  if (tile == ":small") {
    return encode_product<T>(x, W, s, &run_tiles<T, SmallTile>, SmallTile::kWidth);
  }
  if (!tile.empty()) throw py::value_error(tile);
  return encode_product<T>(x, W, s, &run_tiles<T, LargeTile>, LargeTile::kWidth);
}

// dtype: that of x and W, with ":small" behind it for the small tile, ":few" for the kernel of few tokens.
py::tuple encode_tiles(const Array<float>& x, const Array<float>& W, const std::string& dtype,
                       const Array<float>& bias, const Array<float>& values, bool per_token,
                       float window, std::pair<int64_t, int64_t> range, int64_t arena,
                       int64_t capacity) {
  const Selection s = selection(bias, values, per_token, window, range, arena, capacity);
  const std::string type = dtype.substr(0, dtype.find(':')), tile = dtype.substr(type.size());
  if (type == "bfloat16") return encode_tiled<__nv_bfloat16>(x, W, s, tile);
  if (type == "float16") return encode_tiled<__half>(x, W, s, tile);
  return encode_tiled<float>(x, W, s, tile);
}

py::tuple encode_sm90(const Array<float>& x, const Array<float>& W, const std::string& dtype,
                      const Array<float>& bias, const Array<float>& values, bool per_token,
                      float window, std::pair<int64_t, int64_t> range, int64_t arena,
                      int64_t capacity) {
  const Selection s = selection(bias, values, per_token, window, range, arena, capacity);
  if (dtype == "float16") return encode_product<__half>(x, W, s, &run_sm90<__half>, kSm90Latents);
  return encode_product<__nv_bfloat16>(x, W, s, &run_sm90<__nv_bfloat16>, kSm90Latents);
}

py::tuple encode_sums(const Array<float>& sums, int width, const Array<float>& bias,
                      const Array<float>& values, bool per_token, float window,
                      std::pair<int64_t, int64_t> range, int64_t arena, int64_t capacity) {
  const Selection s = selection(bias, values, per_token, window, range, arena, capacity);
  EncodeTiles t = {};
  t.n = sums.shape(0);
  t.d_sae = sums.shape(1);
  return encode(s, t, width, [&](const EncodeTiles& p) {
    if (width == 64) return run_given<64>(p, s.kind, sums.data());
    if (width == 128) return run_given<128>(p, s.kind, sums.data());
    run_given<256>(p, s.kind, sums.data());
  });
}

const BindLater later([](py::module_& m) {
  m.def("cuda_encode_limits", &encode_limits, py::arg("bias"), py::arg("threshold"),
        py::arg("window"));
  m.def("cuda_encode_tiles", &encode_tiles, py::arg("x"), py::arg("W"), py::arg("dtype"),
        py::arg("bias"), py::arg("values"), py::arg("per_token"), py::arg("window"),
        py::arg("range"), py::arg("arena"), py::arg("capacity"));
  m.def("cuda_encode_sm90", &encode_sm90, py::arg("x"), py::arg("W"), py::arg("dtype"),
        py::arg("bias"), py::arg("values"), py::arg("per_token"), py::arg("window"),
        py::arg("range"), py::arg("arena"), py::arg("capacity"));
  m.def("cuda_few_keys", &few_keys, py::arg("x"), py::arg("W"), py::arg("dtype"), py::arg("bias"));
  m.def("cuda_encode_sums", &encode_sums, py::arg("sums"), py::arg("width"), py::arg("bias"),
        py::arg("values"), py::arg("per_token"), py::arg("window"), py::arg("range"),
        py::arg("arena"), py::arg("capacity"));
});

}  // namespace
}  // namespace gemmascope_fast
