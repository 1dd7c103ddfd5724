// The screened TopK encoder's device code on the CPU, a step each: what pre can be at most, in chunks of latents; the
// decisions; what the plain encoder is handed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cuda/topk_screened_kernel.cuh"
#include "cuda/upper_limit_kernel.cuh"
#include "testing/registry.h"
#include "testing/screened_on_cpu.h"

namespace gemmascope_fast {
namespace {

// units and limit of the latents, from their scale and dot.
py::tuple limits(const Array<float>& scale, const Array<float>& dot, const Array<float>& bias) {
  const int64_t d_sae = scale.size();
  std::vector<LatentCodes> latents;
  for (int64_t j = 0; j < d_sae; ++j) latents.push_back({scale.at(j), dot.at(j)});
  auto units = new_array<float>({d_sae}), limit = new_array<float>({d_sae});
  cuda_on_cpu::launch<upper_limit_kernel>(static_cast<unsigned>(d_sae / kUpperLimitThreads + 1),
                                          kUpperLimitThreads, 0, latents.data(), bias.data(), d_sae,
                                          units.mutable_data(), limit.mutable_data());
  return py::make_tuple(units, limit);
}

// offsets, latents, values, needed of latents [first, last).
py::tuple uppers(const Array<int8_t>& x, const Array<float>& scale, const Array<float>& bound,
                 const Array<int8_t>& W, const Array<float>& units, const Array<float>& limit,
                 const Array<float>& least, int64_t first, int64_t last, int64_t capacity,
                 bool hopper) {
  EncodeTiles t = {};
  Memory<int8_t> x_codes(x.size()), W_codes(W.size());
  std::copy_n(x.data(), x.size(), x_codes.data());
  std::copy_n(W.data(), W.size(), W_codes.data());
  t.x = x_codes.data();
  t.W = W_codes.data();
  t.n = x.shape(0);
  t.d = t.x_stride = t.W_stride = x.shape(1);
  t.d_sae = W.shape(0);
  t.first = first;
  t.last = last;
  t.bias = units.data();
  t.limit = limit.data();
  t.scale = scale.data();
  t.bound = bound.data();
  t.least = least.data();
  const Entries found = entries_of<Limit::kUpperBound>(t, capacity, hopper);
  const auto size = static_cast<py::ssize_t>(found.indices.size());
  return py::make_tuple(py::array_t<int64_t>(t.n + 1, found.offsets.data()),
                        py::array_t<int32_t>(size, found.indices.data()),
                        py::array_t<float>(size, found.values.data()), found.needed);
}

template <bool kWide>
void run_decide(const DecideRows& p) {
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(p.to.n, 3));  // so that they loop
  cuda_on_cpu::launch<decide_rows_kernel<kWide>>(
      blocks, kRescoreThreads, static_cast<size_t>(decide_shared(p.x.cols, kWide, p.room)), p);
}

// latents, values, counts, bound of the k best; unsure rows; how many pre-activations there were.
py::tuple decide(const Array<float>& x, int x_dtype, int64_t x_stride, const Array<float>& W,
                 int W_dtype, int64_t W_stride, const Array<float>& bias, const Array<float>& scale,
                 const Array<int32_t>& latents, const Array<float>& uppers,
                 const Array<int32_t>& counts, const Array<float>& bound, int64_t k) {
  Given tokens(x, x_dtype, x_stride), weights(W, W_dtype, W_stride);
  if (!weights.rows.wide) throw py::value_error("W is not wide");
  const int64_t n = x.shape(0);
  auto best_latents = new_array<int32_t>({n, k});
  auto best_values = new_array<float>({n, k}), best_bound = new_array<float>({n});
  auto best_counts = new_array<int32_t>({n});
  std::vector<int64_t> unsure(static_cast<size_t>(n));
  unsigned long long sizes[2] = {0, 0};
  DecideRows p = {};
  p.x = tokens.rows;
  p.W = weights.rows;
  p.bias = bias.data();
  p.scale = scale.data();
  p.room = latents.shape(1);
  p.latents = latents.data();
  p.uppers = uppers.data();
  p.counts = counts.data();
  p.bound = bound.data();
  p.to.n = n;
  p.to.k = k;
  p.to.latents = best_latents.mutable_data();
  p.to.values = best_values.mutable_data();
  p.to.counts = best_counts.mutable_data();
  p.to.bound = best_bound.mutable_data();
  p.unsure = unsure.data();
  p.sizes = sizes;
  W_dtype == kFloat32 ? run_decide<true>(p) : run_decide<false>(p);
  return py::make_tuple(best_latents, best_values, best_counts, best_bound,
                        py::array_t<int64_t>(static_cast<py::ssize_t>(sizes[0]), unsure.data()),
                        sizes[1]);
}

// Rows of float32, 4 to a word.
py::array_t<float> gather(const Array<float>& rows, const Array<int64_t>& which) {
  const int64_t words = rows.shape(1) / 4;
  Memory<float> from(rows.size()), to(which.size() * words * 4);
  std::copy_n(rows.data(), rows.size(), from.data());
  cuda_on_cpu::launch<gather_rows_kernel>(2, kRescoreThreads, 0, from.words.data(), words,
                                          which.data(), which.size(), words, to.words.data());
  auto out = new_array<float>({which.size(), words * 4});
  std::copy_n(to.data(), out.size(), out.mutable_data());
  return out;
}

const BindLater later([](py::module_& module) {
  py::module_ m = module.def_submodule("cuda_topk_screened");
  m.def("room", &screened_room, py::arg("k"), py::arg("d_sae"));
  m.def("limits", &limits, py::arg("scale"), py::arg("dot"), py::arg("bias"));
  m.def("uppers", &uppers);
  m.def("decide", &decide);
  m.def("gather", &gather, py::arg("rows"), py::arg("which"));
});

}  // namespace
}  // namespace gemmascope_fast
