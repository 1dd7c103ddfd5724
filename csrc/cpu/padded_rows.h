// Rows of x and W_enc as the encoders read them: contiguous float32, zero padded to whole vectors.
#pragma once

#include <memory>
#include <vector>

#include "common/matrix.h"
#include "cpu/simd/dot.h"

namespace gemmascope_fast {

// A 1-D float32 tensor as a contiguous array, copied only where it is strided.
class FloatVector {
 public:
  explicit FloatVector(const Tensor& t);
  FloatVector(const FloatVector&) = delete;
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_;
};

// Uninitialised floats on a cache line boundary; grows only.
class FloatBuffer {
 public:
  float* reserve(int64_t size);

 private:
  std::unique_ptr<float[]> storage_;
  int64_t size_ = 0;
  float* aligned_ = nullptr;
};

struct Stretch {
  const char* at;
  int64_t bytes;
};

// Rows of a matrix as zero-padded contiguous float32, in place where they already are.
class PaddedRows {
 public:
  explicit PaddedRows(const Matrix& m);

  int64_t cols() const { return m_.cols; }
  int64_t padded_cols() const { return padded_; }
  bool in_place() const { return in_place_; }
  // Rows of whole vectors, contiguous, of `dtype`: what is widened on the way need not be converted.
  bool whole() const { return unit_ && padded_ == m_.cols; }
  int dtype() const { return static_cast<int>(m_.dtype); }
  const void* row(int64_t r) const { return m_.row(r); }
  // True when a column of rows, not a row, is contiguous in memory.
  bool transposed() const { return transposed_; }
  // How W_enc lies, the rows being its latents.
  const char* layout() const {
    if (transposed_) return "row-major";
    return m_.col_stride == 1 || m_.cols <= 1 ? "feature-major" : "strided";
  }
  // Rows [begin, begin + count), *stride floats apart, in place or written to buffer.
  const float* rows(int64_t begin, int64_t count, FloatBuffer& buffer, int64_t* stride) const;
  // The memory that rows(begin, count) reads, if that is one stretch; else empty.
  Stretch stretch(int64_t begin, int64_t count) const;
  // Starts the read of a share of it.
  void prefetch(int64_t begin, int64_t count, int64_t share, int64_t shares) const;
  void convert(int64_t begin, int64_t count, float* target) const;
  // The same transposed, 16 rows wide: target[k * 16 + r] for k < cols, zeros where r >= count <= 16.
  void lanes(int64_t begin, int64_t count, FloatBuffer& buffer, float* target) const;

 private:
  Matrix m_;
  int64_t padded_;
  bool unit_, in_place_, transposed_;
  const DotTable& table_;
};

}  // namespace gemmascope_fast
