#include "cpu/adam_rows.h"
#include "cuda/adam_matrix.h"
#include "cuda/adam_row.cuh"

namespace gemmascope_fast {
namespace {

void check_devices(const char* op, const char* name, const Tensor& weight,
                   const std::vector<Tensor>& state) {
  if (!weight.is_cuda()) fail(op, name, " must be on a CUDA device");
  static const char* const names[] = {"exp_avg", "exp_avg_sq", "exponents", "touched_at"};
  for (size_t i = 0; i < state.size(); ++i) {
    const bool same =
        state[i].is_cuda() && state[i].get_device_index() == weight.get_device_index();
    if (state[i].numel() > 0 && !same) {
      fail(op, names[i], " must be on cuda:", weight.get_device_index());
    }
  }
}

}  // namespace

void adam_view(const char* op, const char* name, const Tensor& weight,
               const std::vector<Tensor>& state, const std::vector<double>& rates,
               const std::vector<int64_t>& rule, AdamView* view) {
  const AdamMatrix m = adam_matrix(op, name, matrix_of(weight), state, rates, rule);
  check_devices(op, name, weight, state);
  static_assert(kFloat32 == static_cast<int>(Dtype::kFloat32), "dtypes differ");
  static_assert(kBFloat16 == static_cast<int>(Dtype::kBFloat16), "dtypes differ");
  static_assert(kFloat16 == static_cast<int>(Dtype::kFloat16), "dtypes differ");
  static_assert(kMomentColumns == kMomentBlock, "sizes of blocks differ");
  AdamView& a = *view;
  a.weight = const_cast<void*>(m.weight.data);
  a.exp_avg = m.exp_avg;
  a.exp_avg_sq = m.exp_avg_sq;
  a.codes = m.codes;
  a.exponents = m.exponents;
  a.touched_at = m.touched_at;
  a.rows = m.weight.rows;
  a.cols = m.weight.cols;
  a.weight_stride = m.weight.row_stride;
  a.exp_avg_stride = m.exp_avg_stride;
  a.exp_avg_sq_stride = m.exp_avg_sq_stride;
  a.beta1 = m.beta1;
  a.beta2 = m.beta2;
  a.rates = {m.scalars.step_size, m.scalars.one_minus1, m.scalars.one_minus2, m.scalars.scale,
             m.scalars.eps};
  a.step = m.step;
  a.tail = m.tail;
  a.seed = m.seed;
  a.weight_dtype = static_cast<int>(m.weight.dtype);
  a.remove_parallel = m.remove_parallel;
  a.unit_norm = m.unit_norm;
}

}  // namespace gemmascope_fast
