// Whether an op is handed to its Triton launcher, which multiplies densely where that pays (kernels/dense.py):
//
//   if (dense_pays(x, {...})) return call_op(&op_cuda, "gemmascope_fast_triton::op", arguments...);
//
// The choice rests on shapes and on the rates that Python passes once, where Triton is installed. Without them: never.
#pragma once

#include "common/call_op.h"
#include "common/dense_work.h"

namespace gemmascope_fast {

// On the device of `t`.
bool dense_pays(const Tensor& t, const std::vector<DenseWork>& works);

// out [n, d] from the rows of `matrix`, by a pass in token or in latent order.
inline DenseWork sum_work(Walk walk, int64_t capacity, int64_t n, const Tensor& matrix,
                          Dtype result) {
  return sum_work(walk, capacity, n, matrix.size(0), matrix.size(1), dtype_of(matrix), result);
}

inline DenseWork dots_work(int64_t capacity, const Tensor& W, const Tensor& g) {
  return dots_work(capacity, g.size(0), W.size(0), W.size(1), dtype_of(W), dtype_of(g));
}

}  // namespace gemmascope_fast
