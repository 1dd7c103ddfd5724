// Rows of a matrix of any dtype and strides as contiguous float32, and back; buffers for gradients.
//
// Blocks of rows are read and written together: where the rows are columns of memory (row stride 1), a block of 16 is
// one cache line of each column, and reading them one by one would fetch every line 16 times.
#pragma once

#include "common/matrix.h"
#include "cpu/simd/row.h"

namespace gemmascope_fast {

constexpr int64_t kRowBlock = 16;

inline const RowTable& rows_table() { return row_table(simd_target()); }

inline bool unit_columns(const Matrix& m) { return m.col_stride == 1 || m.cols <= 1; }
inline bool direct_rows(const Matrix& m) { return m.dtype == Dtype::kFloat32 && unit_columns(m); }
inline RowSource row_source(const Matrix& m) {
  return {m.data, static_cast<int>(m.dtype), m.row_stride * element_size(m.dtype)};
}

// dst[r * ld + k] = m[begin + r][k] for r < count, and its inverse, which rounds to m's dtype.
void load_rows(const Matrix& m, int64_t begin, int64_t count, float* dst, int64_t ld);
void store_rows(const Matrix& m, int64_t begin, int64_t count, const float* src, int64_t ld);

// A float32 [rows, cols] matrix with contiguous rows, `stride` elements apart: a view of the tensor where it is one
// already, else a copy.
struct FloatRows {
  Tensor keep;
  const float* data = nullptr;
  int64_t cols = 0, stride = 0;
  const float* row(int64_t r) const { return data + r * stride; }
};
FloatRows float_rows(const Tensor& owner, const Matrix& m);

// m itself when its columns have unit stride; else a float32 copy, stored in `keep`, that does.
Matrix gatherable(const Tensor& owner, const Matrix& m, Tensor* keep);

// An uninitialised gradient with the dtype, shape and strides of `parameter`; every row must be written. `touched`: upper bound
// of the fraction of latents that will get something else than zeros. When it is low, a large gradient is made of untouched
// zero pages (`zeroed`): rows nobody writes then cost neither time nor memory. When it is high, huge pages are asked for, and
// always when a row of `latents` (the parameter, one row per latent) is not contiguous, so that it lies on many pages; such a
// gradient is `zeroed`, too.
struct Gradient {
  Tensor tensor;
  bool zeroed = false;
};
Gradient gradient_like(const Tensor& parameter, const Matrix& latents, double touched);

// out[k] = sum over rows of m[r][k], rows ascending.
void sum_rows(const FloatRows& m, int64_t rows, float* out);

Tensor empty_vector(const Tensor& like, ScalarType dtype, int64_t size);

}  // namespace gemmascope_fast
