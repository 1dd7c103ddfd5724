// Arguments of the device code of the passes, from numpy arrays. Matrices are float32 or the bits of a 16-bit dtype
// (`dtype` 1: bfloat16, 2: float16), with any strides; outputs are written in place.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>

#include "cuda/feature_pass_kernel.cuh"
#include "testing/cuda_on_cpu.h"

namespace gemmascope_fast {

namespace py = pybind11;
using Matrix = std::pair<py::array, int>;  // elements, dtype

inline void require(bool ok, const char* message) {
  if (!ok) throw py::value_error(message);
}

inline Rows rows_of(const Matrix& m) {
  const auto& [a, dtype] = m;
  const py::ssize_t size = dtype == kFloat32 ? 4 : 2;
  require(dtype >= 0 && dtype <= 2 && a.itemsize() == size, "dtype 0: float32, else uint16");
  require(a.ndim() == 2, "a matrix has two dimensions");
  Rows r = {a.data(), a.shape(0), a.shape(1), a.strides(0) / size, a.strides(1) / size, dtype, 0};
  r.wide = rows_are_wide(r.data, dtype, r.cols, r.row_stride, r.col_stride) ? 1 : 0;
  return r;
}

inline Target target_of(Matrix& m) {
  const Rows r = rows_of(m);
  return {m.first.mutable_data(), r.rows, r.cols, r.row_stride, r.col_stride, r.dtype, r.wide};
}

// A vector of T, or null for None.
template <class T>
T* vector_of(const py::object& o) {
  if (o.is_none()) return nullptr;
  const auto a = py::cast<py::array>(o);
  require(
      py::isinstance<py::array_t<T>>(a) && a.ndim() >= 1 && (a.flags() & py::array::c_style) != 0,
      "a contiguous vector of another dtype was expected");
  return static_cast<T*>(const_cast<void*>(a.data()));
}

inline int64_t size_of(const py::object& o) { return py::cast<py::array>(o).shape(0); }

// The names are those of FeaturePass; matrices and targets that are absent leave their part out.
inline FeaturePass pass_of(const py::dict& a, StoreGradients* gradients) {
  FeaturePass p = {};
  p.feature_offsets = vector_of<int64_t>(a["feature_offsets"]);
  p.permutation = vector_of<int64_t>(a["permutation"]);
  p.indices = vector_of<int32_t>(a["indices"]);
  p.records = reinterpret_cast<Record*>(vector_of<int32_t>(a["records"]));
  p.capacity = size_of(a["indices"]);
  p.d_sae = size_of(a["feature_offsets"]) - 1;
  p.first = py::cast<int64_t>(a["first"]);
  p.last = py::cast<int64_t>(a["last"]);
  p.n = py::cast<int64_t>(a["n"]);
  p.threshold = vector_of<float>(a["threshold"]);
  p.d_gate = vector_of<float>(a["d_gate"]);
  const double bandwidth = py::cast<double>(a["bandwidth"]);
  p.bandwidth = static_cast<float>(bandwidth);
  p.half = static_cast<float>(bandwidth / 2);
  p.d_b_enc = vector_of<float>(a["d_b_enc"]);
  p.d_threshold = vector_of<float>(a["d_threshold"]);
  p.d_values = vector_of<float>(a["d_values"]);
  p.d_pre = vector_of<float>(a["d_pre"]);
  p.hot_slots = vector_of<int32_t>(a["hot_slots"]);
  p.hot = reinterpret_cast<const HotState*>(vector_of<int64_t>(a["hot"]));
  if (!a["g"].is_none()) {
    p.decoder = 1;
    p.g = rows_of(py::cast<Matrix>(a["g"]));
    auto target = py::cast<Matrix>(a["d_W_dec"]);
    gradients->d_W_dec = target_of(target);
  }
  if (!a["W_dec"].is_none()) {
    p.dots = 1;
    p.W_dec = rows_of(py::cast<Matrix>(a["W_dec"]));
  }
  if (!a["x"].is_none()) {
    p.encoder = 1;
    p.x = rows_of(py::cast<Matrix>(a["x"]));
    auto target = py::cast<Matrix>(a["d_W_enc"]);
    gradients->d_W_enc = target_of(target);
  }
  return p;
}

}  // namespace gemmascope_fast
