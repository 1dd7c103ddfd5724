// A strided 2-D view with its dtype: what the kernels are handed instead of a tensor.
#pragma once

#include "common/check.h"

namespace gemmascope_fast {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

inline Dtype dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// rows x cols elements at data; strides in elements. For W_enc use features(W_enc): one row per latent.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  const void* row(int64_t r) const {
    return static_cast<const char*>(data) + r * row_stride * element_size(dtype);
  }
};

inline Matrix matrix_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// W_enc [d_in, d_sae] seen as one row of d_in elements per latent.
inline Matrix features(const Tensor& W_enc) {
  return {W_enc.data_ptr(), dtype_of(W_enc), W_enc.size(1),
          W_enc.size(0),    W_enc.stride(1), W_enc.stride(0)};
}

}  // namespace gemmascope_fast
