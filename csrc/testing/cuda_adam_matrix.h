// A matrix under Adam as numpy arrays, for the bindings of the optimizer's kernels.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/adam_quad.cuh"

namespace gemmascope_fast {

// {weight, exp_avg or None, exp_avg_sq, exponents or None, touched_at}: float32 or, for bfloat16 and codes, uint16 and
// uint8; written in place.
inline void require_rows(const pybind11::array& t, const char* kind, int64_t rows, int64_t cols) {
  namespace py = pybind11;
  if (!t.dtype().is(py::dtype(kind)) || t.ndim() != 2 || t.shape(0) != rows || t.shape(1) != cols ||
      (cols > 1 && t.strides(1) != t.itemsize()) || !t.writeable()) {
    throw py::value_error(std::string("expected writeable rows of ") + kind);
  }
}

inline AdamView adam_view_of(const std::vector<pybind11::object>& matrix,
                             const std::vector<double>& rates, const std::vector<int64_t>& rule) {
  namespace py = pybind11;
  if (matrix.size() != 5 || rates.size() != 4 || rule.size() != 5) {
    throw py::value_error("matrix [5], rates [4], rule [5]");
  }
  py::array weight = matrix[0], moments = matrix[2], touched = matrix[4];
  AdamView a = {};
  a.weight_dtype = weight.itemsize() == 4 ? kFloat32 : kBFloat16;
  if (weight.ndim() != 2) throw py::value_error("weight must be 2-D");
  a.rows = weight.shape(0);
  a.cols = weight.shape(1);
  require_rows(weight, a.weight_dtype == kFloat32 ? "float32" : "uint16", a.rows, a.cols);
  a.weight = weight.mutable_data();
  a.weight_stride = weight.strides(0) / weight.itemsize();
  if (!matrix[1].is_none()) {
    py::array first = matrix[1];
    require_rows(first, "float32", a.rows, a.cols);
    a.exp_avg = static_cast<float*>(first.mutable_data());
    a.exp_avg_stride = first.strides(0) / 4;
  }
  a.exp_avg_sq_stride = moments.strides(0) / moments.itemsize();
  if (matrix[3].is_none()) {
    require_rows(moments, "float32", a.rows, a.cols);
    a.exp_avg_sq = static_cast<float*>(moments.mutable_data());
  } else {
    py::array exponents = matrix[3];
    require_rows(moments, "uint8", a.rows, a.cols);
    require_rows(exponents, "uint8", a.rows, column_blocks(a));
    a.codes = static_cast<uint8_t*>(moments.mutable_data());
    a.exponents = static_cast<uint8_t*>(exponents.mutable_data());
  }
  if (!touched.dtype().is(py::dtype::of<int64_t>()) || touched.size() != a.rows) {
    throw py::value_error("touched_at [rows] int64");
  }
  a.touched_at = static_cast<int64_t*>(touched.mutable_data());
  a.beta1 = rates[1];
  a.beta2 = rates[2];
  a.step = rule[0];
  a.tail = std::min(rule[1], rule[0]);
  a.remove_parallel = rule[2] != 0;
  a.unit_norm = rule[3] != 0;
  a.seed = static_cast<uint64_t>(rule[4]);
  const double t = static_cast<double>(a.step);
  a.rates = {static_cast<float>(rates[0] / (1 - std::pow(a.beta1, t))),
             static_cast<float>(1 - a.beta1), static_cast<float>(1 - a.beta2),
             static_cast<float>(1 / std::sqrt(1 - std::pow(a.beta2, t))),
             static_cast<float>(rates[3])};
  return a;
}

}  // namespace gemmascope_fast
