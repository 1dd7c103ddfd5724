// Micro-kernels on rows of d floats: what decode and every backward pass are made of.
//
//   gather      acc[k]  = fma(coef[e], W[indices[e]][k], acc[k])       entries in order
//   gather_dot  out[e]  = dot(W[indices[e]], g)                        canonical 16-lane dot
//   axpy        acc[k]  = fma(coef[e], rows[e][k], acc[k])             up to four rows
//   dot_axpy    dots[e] = dot(rows[e], w), and axpy in the same sweep
//   stream      copies bytes around the caches; see stream.h
//
// Every element sees the same fma sequence in every variant, so targets agree to the bit. Rows of W come from DRAM: four
// are read at a time while the next four are prefetched (one row at a time leaves two thirds of the bandwidth unused).
// `first` starts the accumulation from 0 without reading acc, so fresh memory is written once and never read.
#pragma once

#include <stdint.h>

#include "cpu/simd_target.h"

namespace gemmascope_fast {

constexpr int kRowGroup = 4;

// Rows of a matrix with unit column stride; dtype is a Dtype of common/matrix.h as an int.
struct RowSource {
  const void* data;
  int dtype;
  int64_t row_bytes;
};

// Memory to prefetch while a row is swept: the address that matches element 0, and the size of its elements. May be null.
struct RowAhead {
  const void* data;
  int64_t element_size;
};

struct RowTable {
  void (*widen)(int dtype, const void* src, int64_t d, float* dst);
  void (*narrow)(int dtype, const float* src, int64_t d, void* dst);
  // Entries [0, count); indices may be read, for prefetching only, up to `readable`.
  void (*gather)(RowSource source, const int32_t* indices, const float* coef, int64_t count,
                 int64_t readable, int64_t d, float* acc);
  void (*gather_dot)(RowSource source, const int32_t* indices, int64_t count, int64_t readable,
                     int64_t d, const float* g, float* out);
  // count in [1, kRowGroup].
  void (*axpy)(const float* const* rows, const float* coef, int count, bool first, int64_t d,
               RowAhead ahead, float* acc);
  void (*dot_axpy)(const float* const* rows, const float* coef, int count, bool first, int64_t d,
                   const float* w, RowAhead ahead, float* acc, float* dots);
  // src null: zeros. Other threads may read dst once stream_fence() has been called.
  void (*stream)(const void* src, int64_t bytes, void* dst);
  void (*stream_fence)();
};

const RowTable& row_table(SimdTarget target);

}  // namespace gemmascope_fast
