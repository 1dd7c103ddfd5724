// The feature-major pass that ends in an update of its rows (fused_sparse_step) on the CPU, over numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda/fused_sparse_step_kernel.cuh"
#include "testing/cuda_adam_matrix.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;

// A contiguous vector of T, or null for None.
template <class T>
T* vector_of(const py::dict& a, const char* name) {
  if (a[name].is_none()) return nullptr;
  const auto t = py::cast<py::array>(a[name]);
  if (!t.dtype().is(py::dtype::of<T>()) || (t.flags() & py::array::c_style) == 0) {
    throw py::value_error(std::string(name) + ": a contiguous vector of another dtype is needed");
  }
  return static_cast<T*>(const_cast<void*>(t.data()));
}

int64_t size_of(const py::dict& a, const char* name) {
  return py::cast<py::array>(a[name]).shape(0);
}

// (elements, dtype) with adjacent columns.
Rows rows_of(const py::dict& a, const char* name) {
  const auto [t, dtype] = py::cast<std::pair<py::array, int>>(a[name]);
  const py::ssize_t size = dtype == kFloat32 ? 4 : 2;
  if (t.ndim() != 2 || t.itemsize() != size) throw py::value_error("a matrix of another dtype");
  Rows r = {t.data(), t.shape(0), t.shape(1), t.strides(0) / size, t.strides(1) / size, dtype, 0};
  r.wide = rows_are_wide(r.data, dtype, r.cols, r.row_stride, r.col_stride) ? 1 : 0;
  return r;
}

FeaturePass pass_of(const py::dict& a) {
  FeaturePass p = {};
  p.feature_offsets = vector_of<int64_t>(a, "feature_offsets");
  p.permutation = vector_of<int64_t>(a, "permutation");
  p.indices = vector_of<int32_t>(a, "indices");
  p.records = reinterpret_cast<Record*>(vector_of<int32_t>(a, "records"));
  p.capacity = size_of(a, "indices");
  p.d_sae = size_of(a, "feature_offsets") - 1;
  p.first = py::cast<int64_t>(a["first"]);
  p.last = py::cast<int64_t>(a["last"]);
  p.threshold = vector_of<float>(a, "threshold");
  p.d_gate = vector_of<float>(a, "d_gate");
  const double bandwidth = py::cast<double>(a["bandwidth"]);
  p.bandwidth = static_cast<float>(bandwidth);
  p.half = static_cast<float>(bandwidth / 2);
  p.d_b_enc = vector_of<float>(a, "d_b_enc");
  p.d_threshold = vector_of<float>(a, "d_threshold");
  p.decoder = p.dots = p.encoder = 1;
  p.g = rows_of(a, "g");
  p.W_dec = rows_of(a, "W_dec");
  p.x = rows_of(a, "x");
  p.n = p.x.rows;
  return p;
}

template <int K>
void run(const FeaturePass& p, const FeatureShape& shape, const AdamFinish& finish) {
  const auto bytes = static_cast<size_t>(shape.bytes);
  const unsigned windows = static_cast<unsigned>(feature_windows(p));
  if (windows > 0) {
    cuda_on_cpu::launch<feature_pieces_kernel<K>>(windows, shape.threads, bytes, p);
  }
  if (p.last == p.first) return;
  cuda_on_cpu::launch<feature_pass_kernel<K, AdamFinish>>(static_cast<unsigned>(p.last - p.first),
                                                          shape.threads, bytes, p, finish);
}

// Latents `first` to `last`; the names are those of FeaturePass. `encoder` and `decoder`: (matrix, rates, rule) as
// cuda_adam_step takes them. Returns K.
using Update = std::tuple<std::vector<py::object>, std::vector<double>, std::vector<int64_t>>;

int fused_pass(const py::dict& a, const Update& encoder, const Update& decoder, int64_t shared) {
  FeaturePass p = pass_of(a);
  const AdamFinish finish = {std::apply(adam_view_of, encoder), std::apply(adam_view_of, decoder)};
  if (finish.encoder.rows != p.d_sae || finish.decoder.rows != p.d_sae ||
      finish.encoder.cols != p.x.cols || finish.decoder.cols != p.g.cols) {
    throw py::value_error("matrices of other shapes than the pass");
  }
  const FeatureShape shape = feature_shape(p, shared, 64 * shared, &AdamFinish::blocks);
  std::vector<float> pieces(static_cast<size_t>(feature_windows(p) * feature_piece_size(p)), NAN);
  p.pieces = pieces.data();
  p.stages = shape.stages;
  if (shape.K == 1) run<1>(p, shape, finish);
  if (shape.K == 2) run<2>(p, shape, finish);
  if (shape.K == 3) run<3>(p, shape, finish);
  if (shape.K == 4) run<4>(p, shape, finish);
  return shape.K;
}

const BindLater later([](py::module_& m) {
  m.def("cuda_fused_pass", &fused_pass, py::arg("arguments"), py::arg("encoder"),
        py::arg("decoder"), py::arg("shared"));
});

}  // namespace
}  // namespace gemmascope_fast
