// The screened encoder's device code on the CPU: codes, bounds, candidates, rescoring, with the host code of
// cuda/encode_screened.cu in its shortest form. The int8 products are those of encode_sm90_kernel, or, as that is slow
// here, plain loops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "cuda/encode_limit_kernel.cuh"
#include "cuda/rescore_kernel.cuh"
#include "testing/registry.h"
#include "testing/screened_on_cpu.h"

namespace gemmascope_fast {
namespace {

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
    QuantiseRows p = {x.rows,       center.data(), width,   n,       nullptr, x_codes.data(),
                      scale.data(), bound.data(),  nullptr, nullptr, 0,       0};
    run_quantise<false>(p);
    p = {W.rows,  center.data(), width,          d_sae,       nullptr, W_codes.data(),
         nullptr, nullptr,       latents.data(), &unscreened, 0,       0};
    run_quantise<true>(p);
    const unsigned blocks = static_cast<unsigned>(d_sae / kQuantiseThreads + 1);
    cuda_on_cpu::launch<encode_limit_kernel>(blocks, kLimitThreads, 0, bias.data(),
                                             threshold.data(), window, d_sae, limit.data());
    cuda_on_cpu::launch<screen_limit_kernel>(blocks, kQuantiseThreads, 0, latents.data(), d_sae,
                                             limit.data());
    EncodeTiles t = {};
    t.x = x_codes.data();
    t.W = W_codes.data();
    t.n = n;
    t.d = t.x_stride = t.W_stride = width;
    t.d_sae = t.last = d_sae;
    t.scale = scale.data();
    t.bound = bound.data();
    t.limit = limit.data();
    auto found = entries_of<Limit::kScreened>(t, n * d_sae, hopper);
    return {found.offsets, found.indices};
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
