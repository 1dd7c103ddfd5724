// adam_step_ on the CPU: Adam on the touched and live rows of weight [r, c]; formula in simd/adam_row.h, rules in adam_rows.h.
//
// Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
// Rows are independent: threads take ranges of them. A gradient row that is not contiguous float32 is widened first.
// Bound by DRAM: the whole gradient is read to find the touched rows; w, v (and m) of those are read and written.
#include <torch/csrc/stable/library.h>

#include "cpu/adam_rows.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "adam_step_";
constexpr int64_t kGrain = 64;

}  // namespace

void adam_step_cpu(const Tensor& weight, std::vector<Tensor> state, const Tensor& gradient,
                   std::vector<double> rates, std::vector<int64_t> rule) {
  check_dim(kOp, "weight", weight, 2);
  check_float(kOp, "weight", weight);
  check_float(kOp, "gradient", gradient);
  check_shape(kOp, "gradient", gradient, {weight.size(0), weight.size(1)});
  const AdamMatrix matrix = adam_matrix(kOp, "weight", matrix_of(weight), state, rates, rule);
  const Matrix rows = matrix_of(gradient);
  parallel_ranges(rows.rows, kGrain, [&](int64_t begin, int64_t end) {
    AdamRows adam(matrix);
    std::vector<float> wide(static_cast<size_t>(direct_rows(rows) ? 0 : rows.cols));
    for (int64_t j = begin; j < end; ++j) {
      if (!direct_rows(rows)) load_rows(rows, j, 1, wide.data(), rows.cols);
      const float* g = direct_rows(rows) ? static_cast<const float*>(rows.row(j)) : wide.data();
      adam.update(j, g);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, adam_step_cpu); }

}  // namespace gemmascope_fast
