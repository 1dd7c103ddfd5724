// White-box bindings for the tests: every SIMD variant's micro-kernels over numpy arrays. Ops are never bound here, they
// go through the torch dispatcher. Arrays are float32, or uint16 holding the bits of bfloat16 (dtype 1) or float16
// (dtype 2). Sizes are checked here, so that a wrong test fails instead of writing past an array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/sample_ranks.h"
#include "cpu/simd/dot.h"
#include "cpu/simd/row.h"
#include "cpu/simd/screen.h"
#include "cpu/simd_target.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Target = SimdTarget;

void require(bool ok, const char* message) {
  if (!ok) throw py::value_error(message);
}

const DotTable& dots(Target target) {
  require(simd_target_available(target), "this processor or build does not have the target");
  return dot_table(target);
}

const RowTable& rows(Target target) {
  require(simd_target_available(target), "this processor or build does not have the target");
  return row_table(target);
}

// Number of columns of a 2-D, row-contiguous array of float32 (dtype 0) or of 16-bit patterns (dtype 1, 2).
int64_t columns(const py::array& a, int dtype) {
  const py::dtype wanted = dtype == 0 ? py::dtype::of<float>() : py::dtype::of<uint16_t>();
  require(dtype >= 0 && dtype <= 2, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(a.dtype().is(wanted), "array must be float32 for dtype 0, else uint16");
  require(a.ndim() == 2 && (a.shape(1) < 2 || a.strides(1) == a.itemsize()),
          "array must be 2-D with contiguous rows");
  return a.shape(1);
}

RowSource source_of(const py::array& W, int dtype) { return {W.data(), dtype, W.strides(0)}; }

void check_indices(const Ints& indices, const py::array& W) {
  for (py::ssize_t e = 0; e < indices.size(); ++e) {
    require(indices.data()[e] >= 0 && indices.data()[e] < W.shape(0), "index out of range");
  }
}

Floats dot_panel(Target target, const Floats& x, const Floats& w) {
  require(x.ndim() == 2 && w.ndim() == 2 && x.shape(1) == w.shape(1), "x [r, d], w [l, d]");
  const int64_t r = x.shape(0), l = w.shape(0), d = x.shape(1);
  require(d % 16 == 0, "d must be a multiple of 16");
  require(r <= dots(target).tile_rows, "too many rows");
  std::vector<float> state(static_cast<size_t>(r * l * 16 + 16));
  Floats out({r, l});
  dots(target).panel(x.data(), d, r, w.data(), d, l, d, state.data(), out.mutable_data(), l);
  return out;
}

py::tuple dot_above(Target target, const Floats& dot, const Floats& bias, const Floats& limit) {
  const int64_t count = dot.size();
  require(bias.size() == count && (limit.size() == count || limit.size() == 1), "sizes differ");
  std::vector<int32_t> position(static_cast<size_t>(count + 16));
  std::vector<float> pre(static_cast<size_t>(count + 16));
  const int64_t found =
      dots(target).above(dot.data(), bias.data(), limit.data(), limit.size() == count ? 1 : 0,
                         count, position.data(), pre.data());
  return py::make_tuple(Ints(found, position.data()), Floats(found, pre.data()));
}

Floats dot_widen(Target target, const py::array& source, int dtype) {
  const int64_t d = columns(source, dtype);
  Floats out({source.shape(0), source.shape(1)});
  for (int64_t r = 0; r < source.shape(0); ++r) {
    dots(target).widen(source.data(r, 0), dtype, d, out.mutable_data(r, 0));
  }
  return out;
}

Floats dot_transpose(Target target, const py::array& source, int dtype) {
  const int64_t d = columns(source, dtype), n = source.shape(0);
  Floats out({d, n});
  dots(target).transpose(source.data(), source.strides(0) / source.itemsize(), dtype, n, d,
                         out.mutable_data(), n);
  return out;
}

Floats row_widen(Target target, const py::array& source, int dtype) {
  const int64_t d = columns(source, dtype);
  Floats out({source.shape(0), source.shape(1)});
  for (int64_t r = 0; r < source.shape(0); ++r) {
    rows(target).widen(dtype, source.data(r, 0), d, out.mutable_data(r, 0));
  }
  return out;
}

py::array row_narrow(Target target, const Floats& source, int dtype) {
  require(source.ndim() == 1 && dtype >= 0 && dtype <= 2, "1-D source, dtype 0, 1 or 2");
  if (dtype == 0) {
    Floats out(source.size());
    rows(target).narrow(dtype, source.data(), source.size(), out.mutable_data());
    return std::move(out);
  }
  py::array_t<uint16_t> out(source.size());
  rows(target).narrow(dtype, source.data(), source.size(), out.mutable_data());
  return std::move(out);
}

// acc + sum of coef[e] * W[indices[e]]
Floats row_gather(Target target, const py::array& W, int dtype, const Ints& indices,
                  const Floats& coef, const Floats& acc) {
  const int64_t d = columns(W, dtype);
  require(acc.size() == d && coef.size() == indices.size(), "sizes differ");
  check_indices(indices, W);
  Floats out(d, acc.data());
  rows(target).gather(source_of(W, dtype), indices.data(), coef.data(), indices.size(),
                      indices.size(), d, out.mutable_data());
  return out;
}

// <W[indices[e]], g> for every e
Floats row_gather_dot(Target target, const py::array& W, int dtype, const Ints& indices,
                      const Floats& g) {
  const int64_t d = columns(W, dtype);
  require(g.size() == d, "sizes differ");
  check_indices(indices, W);
  Floats out(indices.size());
  rows(target).gather_dot(source_of(W, dtype), indices.data(), indices.size(), indices.size(), d,
                          g.data(), out.mutable_data());
  return out;
}

std::vector<const float*> pointers(const Floats& group, const Floats& coef) {
  require(group.ndim() == 2 && group.shape(0) >= 1 && group.shape(0) <= kRowGroup,
          "1 to 4 rows at a time");
  require(coef.size() == group.shape(0), "one coefficient per row");
  std::vector<const float*> result;
  for (py::ssize_t e = 0; e < group.shape(0); ++e) result.push_back(group.data(e, 0));
  return result;
}

// (first ? 0 : acc) + sum of coef[e] * group[e]
Floats row_axpy(Target target, const Floats& group, const Floats& coef, bool first,
                const Floats& acc) {
  const std::vector<const float*> row = pointers(group, coef);
  require(acc.size() == group.shape(1), "sizes differ");
  Floats out(acc.size(), acc.data());
  rows(target).axpy(row.data(), coef.data(), static_cast<int>(row.size()), first, acc.size(),
                    {nullptr, 4}, out.mutable_data());
  return out;
}

// row_axpy, and <group[e], w> for every e
py::tuple row_dot_axpy(Target target, const Floats& group, const Floats& coef, bool first,
                       const Floats& w, const Floats& acc) {
  const std::vector<const float*> row = pointers(group, coef);
  require(acc.size() == group.shape(1) && w.size() == acc.size(), "sizes differ");
  Floats out(acc.size(), acc.data()), dot(coef.size());
  rows(target).dot_axpy(row.data(), coef.data(), static_cast<int>(row.size()), first, acc.size(),
                        w.data(), {nullptr, 4}, out.mutable_data(), dot.mutable_data());
  return py::make_tuple(out, dot);
}

// Operations per second of the screening tile on operands in L1, with `threads` threads: the ceiling of a screened encoder.
double screen_rate(Target target, int64_t threads) {
  require(simd_target_available(target), "this processor or build does not have the target");
  const ScreenTable& table = screen_table(target);
  constexpr int64_t kWidth = 512, kTiles = 20000;
  const auto work = [&] {
    const Codes<uint8_t> w(kScreenBlock * kWidth, 1);
    const Codes<int8_t> x(kGroupRows * kWidth, 1);
    const std::vector<float> scale(kScreenBlock, 1.0f);
    const std::vector<int32_t> sum(kScreenRows, 0);
    ScreenLatents latents = {};
    latents.scale = scale.data();
    ScreenTokens tokens[2] = {};
    for (ScreenTokens& own : tokens) {
      own.scale = scale.data();
      own.sum = sum.data();
    }
    const std::vector<const char*> nothing(2 * kWidth / kScreenUnit,
                                           reinterpret_cast<const char*>(w.data()));
    const ScreenTile tile = {w.data(), x.data(), table.rows, kWidth, 0, kWidth, nothing.data()};
    uint64_t masks[kGroupRows];
    float products[kGroupRows * kScreenBlock];
    if (table.begin != nullptr) table.begin();
    for (int64_t i = 0; i < kTiles; ++i) table.tile(tile, latents, tokens[0], masks, products);
    if (table.end != nullptr) table.end();
  };
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double operations =
        2.0 * static_cast<double>(table.rows * kScreenBlock * kWidth * kTiles * threads);
    best = std::max(best, operations / seconds.count());
  }
  return best;
}

// The rank after 1, 2 ... total values.
std::vector<int64_t> sample_ranks(int64_t k, int64_t total) {
  require(k > 0 && total > 0, "k and total must be positive");
  const SampleRanks ranks(k, total);
  std::vector<int64_t> out;
  for (int64_t shown = 1; shown <= total; ++shown) out.push_back(ranks.rank(shown));
  return out;
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  py::enum_<SimdTarget>(m, "SimdTarget")
      .value("generic", SimdTarget::kGeneric)
      .value("avx2", SimdTarget::kAvx2)
      .value("avx2_vnni", SimdTarget::kAvx2Vnni)
      .value("avx512", SimdTarget::kAvx512)
      .value("avx512_amx", SimdTarget::kAvx512Amx)
      .value("neon", SimdTarget::kNeon);
  m.def("simd_target", &simd_target);
  m.def("simd_target_available", &simd_target_available);
  m.def("simd_target_name", &simd_target_name);

  m.def("dot_tile_rows", [](Target target) { return dots(target).tile_rows; });
  m.def("dot_panel", &dot_panel, py::arg("target"), py::arg("x"), py::arg("w"));
  m.def("dot_above", &dot_above, py::arg("target"), py::arg("dots"), py::arg("bias"),
        py::arg("limit"));
  m.def("dot_widen", &dot_widen, py::arg("target"), py::arg("source"), py::arg("dtype"));
  m.def("dot_transpose", &dot_transpose, py::arg("target"), py::arg("source"), py::arg("dtype"));

  m.def("sample_ranks", &sample_ranks, py::arg("k"), py::arg("total"));
  m.def("screen_rate", &screen_rate, py::arg("target"), py::arg("threads"));

  m.def("row_widen", &row_widen, py::arg("target"), py::arg("source"), py::arg("dtype"));
  m.def("row_narrow", &row_narrow, py::arg("target"), py::arg("source"), py::arg("dtype"));
  m.def("row_gather", &row_gather, py::arg("target"), py::arg("W"), py::arg("dtype"),
        py::arg("indices"), py::arg("coef"), py::arg("acc"));
  m.def("row_gather_dot", &row_gather_dot, py::arg("target"), py::arg("W"), py::arg("dtype"),
        py::arg("indices"), py::arg("g"));
  m.def("row_axpy", &row_axpy, py::arg("target"), py::arg("rows"), py::arg("coef"),
        py::arg("first"), py::arg("acc"));
  m.def("row_dot_axpy", &row_dot_axpy, py::arg("target"), py::arg("rows"), py::arg("coef"),
        py::arg("first"), py::arg("w"), py::arg("acc"));

  for (const Bind bind : bindings()) bind(m);
}

}  // namespace gemmascope_fast
