// Checked tensors of the passes over entries, and matrices as the device code takes them.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "common/check.h"
#include "common/matrix.h"
#include "cuda/rows.cuh"
#include "cuda/runtime.h"

namespace gemmascope_fast {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// `like` has been checked with itself before.
inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (!like.is_cuda()) fail(op, name, " must be on a CUDA device, as other tensors are");
  if (t.is_cuda() && t.get_device_index() == like.get_device_index()) return;
  fail(op, name,
       " must be on the CUDA device of the other tensors, cuda:", like.get_device_index());
}

// A contiguous vector of `size` elements.
inline Tensor vector_of(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                        int64_t size, const Tensor& like) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, {size});
  check_device(op, name, t, like);
  return torch::stable::contiguous(t);
}

inline void check_matrix(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_dim(op, name, t, 2);
  check_float(op, name, t);
  check_device(op, name, t, like);
}

// CSR entries on n rows. Offsets and indices are not looked at: that would wait for the device.
struct DeviceEntries {
  Tensor offsets, indices;  // contiguous
  int64_t n, capacity;

  const int64_t* offsets_data() const { return static_cast<const int64_t*>(offsets.data_ptr()); }
  const int32_t* indices_data() const { return static_cast<const int32_t*>(indices.data_ptr()); }
};

inline DeviceEntries entries_of(const char* op, const Tensor& offsets, const Tensor& indices,
                                const Tensor& like) {
  check_dim(op, "offsets", offsets, 1);
  check_dim(op, "indices", indices, 1);
  if (offsets.size(0) < 1) fail(op, "offsets must have n + 1 elements, got shape [0]");
  DeviceEntries entries{offsets, indices, offsets.size(0) - 1, indices.size(0)};
  if (entries.n > std::numeric_limits<int32_t>::max()) {
    fail(op, "offsets has ", entries.n, " rows, expected fewer than 2^31");
  }
  entries.offsets = vector_of(op, "offsets", offsets, ScalarType::Long, entries.n + 1, like);
  entries.indices = vector_of(op, "indices", indices, ScalarType::Int, entries.capacity, like);
  return entries;
}

// values, gate, d_values, d_gate: one float32 per entry; null when absent.
inline std::optional<Tensor> numbers_of(const char* op, const char* name,
                                        const std::optional<Tensor>& t,
                                        const DeviceEntries& entries) {
  if (!t.has_value()) return std::nullopt;
  return vector_of(op, name, *t, ScalarType::Float, entries.capacity, entries.offsets);
}

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
inline const float* floats(const std::optional<Tensor>& t) {
  return t.has_value() ? floats(*t) : nullptr;
}
inline float* mutable_floats(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<float*>(t.data_ptr());
}

inline Tensor new_floats(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

inline Rows rows_of(const Matrix& m) {
  const int dtype = static_cast<int>(m.dtype);
  const bool wide = rows_are_wide(m.data, dtype, m.cols, m.row_stride, m.col_stride);
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride, dtype, wide ? 1 : 0};
}

inline Rows rows_of(const Tensor& t) { return rows_of(matrix_of(t)); }

inline Target target_of(const Tensor& t) {
  const Rows m = rows_of(t);
  return {const_cast<void*>(m.data), m.rows, m.cols, m.row_stride, m.col_stride, m.dtype, m.wide};
}

// t, or a copy of it, with the columns of a row adjacent in memory: any other column is a sector of 32 bytes.
inline Tensor adjacent_columns(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

// The sum over all dimensions but the last, float32.
inline Tensor sum_rows(const Tensor& t) {
  const int64_t dims[] = {0, 1};
  const torch::headeronly::IntHeaderOnlyArrayRef all(dims, static_cast<size_t>(t.dim() - 1));
  return torch::stable::sum(t, all, false, ScalarType::Float);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

}  // namespace gemmascope_fast
