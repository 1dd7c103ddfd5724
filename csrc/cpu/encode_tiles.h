// The loop all encoders share: canonical dots of rows of x with blocks of latents, never held for
// more than one tile.
//
// Tasks are (row block, latent range) pairs. Within a task blocks of latents that fit half an L2
// are streamed, converted and transposed first where W_enc's dtype or layout asks for it, and every
// panel of rows visits each block.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "common/matrix.h"
#include "cpu/simd/dot.h"

namespace gemmascope_fast {

// Checks x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae] and that 32-bit indices suffice.
void check_encode(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc);

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

// Rows of a matrix as zero-padded contiguous float32, in place where they already are.
class PaddedRows {
 public:
  explicit PaddedRows(const Matrix& m);

  int64_t padded_cols() const { return padded_; }
  bool in_place() const { return in_place_; }
  // True when a column of rows, not a row, is contiguous in memory.
  bool transposed() const { return transposed_; }
  // Rows [begin, begin + count), *stride floats apart, in place or written to buffer.
  const float* rows(int64_t begin, int64_t count, FloatBuffer& buffer, int64_t* stride) const;
  // Starts the read of a share of what rows(begin, count) would touch, if that is a plain stretch
  // of memory.
  void prefetch(int64_t begin, int64_t count, int64_t share, int64_t shares) const;
  void convert(int64_t begin, int64_t count, float* target) const;

 private:
  Matrix m_;
  int64_t padded_;
  bool in_place_, transposed_;
  const DotTable& table_;
};

class EncodeTiles {
 public:
  struct Task {
    int64_t row_begin, row_end, latent_begin, latent_end;
    int64_t rows() const { return row_end - row_begin; }
    int64_t latents() const { return latent_end - latent_begin; }
  };
  // Called with the dots of one row and `count` latents from `latent` on; latents ascend within a
  // task.
  using Visit = std::function<void(int64_t row, int64_t latent, int64_t count, const float* dots)>;

  // Neither side of a task exceeds this, so that 16 bits hold a position inside it.
  static constexpr int64_t kMaxSide = 65536;

  EncodeTiles(const Matrix& x, const Matrix& w);

  const DotTable& table() const { return table_; }
  int64_t rows() const { return n_; }
  int64_t row_blocks() const { return row_blocks_; }
  int64_t row_block() const { return row_block_; }
  int64_t ranges() const { return ranges_; }
  int64_t range() const { return range_; }
  int64_t tasks() const { return row_blocks_ * ranges_; }
  // Latents of one visit at most.
  int64_t block() const { return block_; }
  // Thread slots to run the tasks with.
  int64_t slots() const { return slots_; }
  Task task(int64_t index) const;
  void run(const Task& task, int64_t slot, const Visit& visit);

 private:
  struct Scratch {
    FloatBuffer weights, state, dots;
  };

  const DotTable& table_;
  PaddedRows x_rows_, w_rows_;
  int64_t n_, d_sae_, row_block_, row_blocks_, block_, range_, ranges_, slots_;
  FloatBuffer x_buffer_;
  const float* x_;
  int64_t x_stride_;
  std::vector<Scratch> scratch_;
};

}  // namespace gemmascope_fast
