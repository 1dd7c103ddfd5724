// Adam on rows of a weight matrix, one at a time: what adam_step_ and fused_sparse_step share, so that both give the same
// bits. The formula is in simd/adam_row.h; what is decided here, per row:
//
//   touched   the gradient row has an element other than 0 (NaN counts)
//   live      touched at most `tail` steps ago: the first moment still moves it
//   k         steps since the row's moments were brought up to date: the decays are beta^k
//
// Rows that are neither touched nor live are not read, nor is any of their state. With beta1 = 0 dense Adam does not move
// them: tail = 0 is exact.
#pragma once

#include "cpu/matrix_rows.h"
#include "cpu/simd/adam_row.h"

namespace gemmascope_fast {

inline const AdamRowTable& adam_table() { return adam_row_table(simd_target()); }

// The arguments of one matrix, checked.
struct AdamMatrix {
  Matrix weight;                 // [r, c], float32 or bfloat16, rows contiguous
  float* exp_avg = nullptr;      // [r, c], null when beta1 = 0
  float* exp_avg_sq = nullptr;   // [r, c], null with 8-bit codes
  uint8_t* codes = nullptr;      // [r, c]
  uint8_t* exponents = nullptr;  // [r, blocks]
  int64_t exp_avg_stride = 0, exp_avg_sq_stride = 0, blocks = 0;
  int64_t* touched_at = nullptr;  // [r]
  double beta1 = 0, beta2 = 0;
  AdamScalars scalars{};  // decays are set per row
  int64_t step = 0, tail = 0;
  bool remove_parallel = false, unit_norm = false;
  uint64_t seed = 0;
};

// `name` is the weight's in messages; state = {exp_avg, exp_avg_sq, exponents, touched_at}, rates = {lr, beta1, beta2, eps},
// rule = {step, tail, remove_parallel, unit_norm, seed}.
AdamMatrix adam_matrix(const char* op, const char* name, const Matrix& weight,
                       const std::vector<Tensor>& state, const std::vector<double>& rates,
                       const std::vector<int64_t>& rule);

class AdamRows {
 public:
  explicit AdamRows(const AdamMatrix& matrix);
  // gradient null: the row has none. next: the row to be updated after it, or -1; its second moments are prefetched.
  void update(int64_t row, const float* gradient, int64_t next = -1);

 private:
  void step_row(int64_t row, const float* gradient, int64_t gap, int64_t next);
  RowAhead moments_of(int64_t row) const;
  void store(int64_t row);

  const AdamMatrix& m_;
  std::vector<float> weight_, moment_;  // of rows that are not float32
  std::vector<uint32_t> random_;
};

}  // namespace gemmascope_fast
