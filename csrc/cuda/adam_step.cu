// adam_step_ on CUDA: host wrapper of adam_step_kernel.cuh. Never waits for the device.
//
// Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1. A gradient whose rows are not contiguous is copied first.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/matrix.h"
#include "cuda/adam_matrix.h"
#include "cuda/adam_step.h"
#include "cuda/adam_step_kernel.cuh"
#include "cuda/operands.h"
#include "cuda/runtime.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "adam_step_";
constexpr int64_t kLargestGrid = (int64_t{1} << 31) - 1;

unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kLargestGrid)); }

template <int kThreads>
void launch_rows(const char* op, const AdamView& a, const AdamGradient& g, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(adam_row_bytes(a.cols));
  adam_step_kernel<kThreads><<<grid_of(a.rows), kThreads, bytes, stream>>>(a, g);
  check_launch(op);
}

template <SlabWork kWork>
void launch_slabs(const char* op, const AdamView& a, const AdamGradient& g, const AdamSlabs& s,
                  cudaStream_t stream) {
  adam_slab_kernel<kWork><<<grid_of(a.rows * s.slabs), kSlabThreads, 0, stream>>>(a, g, s);
  check_launch(op);
}

void step_in_slabs(const char* op, const AdamView& a, const AdamGradient& g, const Tensor& like,
                   cudaStream_t stream) {
  const bool measured = a.remove_parallel || a.unit_norm;
  const int64_t blocks = (a.cols + kMomentColumns - 1) / kMomentColumns;
  const Tensor found = torch::stable::new_zeros(like, {a.rows}, ScalarType::Int);
  const Tensor before = torch::stable::new_empty(like, {a.rows}, ScalarType::Long);
  const Tensor sums =
      torch::stable::new_empty(like, {measured ? 3 * a.rows * blocks : 0}, ScalarType::Float);
  AdamSlabs s;
  s.slabs = (a.cols + kSlab - 1) / kSlab;
  s.found = static_cast<int32_t*>(found.data_ptr());
  s.before = static_cast<int64_t*>(before.data_ptr());
  s.sums = static_cast<float*>(sums.data_ptr());
  launch_slabs<SlabWork::kLook>(op, a, g, s, stream);
  if (a.remove_parallel) launch_slabs<SlabWork::kSums>(op, a, g, s, stream);
  if (a.unit_norm) launch_slabs<SlabWork::kMeasure>(op, a, g, s, stream);
  launch_slabs<SlabWork::kStore>(op, a, g, s, stream);
}

}  // namespace

void adam_step_rows(const char* op, const AdamView& a, const Tensor& gradient_in,
                    cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return;
  const bool adjacent = a.cols == 1 || gradient_in.stride(1) == 1;
  const Tensor gradient = adjacent ? gradient_in : torch::stable::contiguous(gradient_in);
  const AdamGradient g = {gradient.data_ptr(), gradient.stride(0),
                          static_cast<int>(dtype_of(gradient))};
  if (a.cols <= 1024) {
    launch_rows<64>(op, a, g, stream);
  } else if (a.cols <= kAdamLargestRow) {
    launch_rows<256>(op, a, g, stream);
  } else {
    step_in_slabs(op, a, g, gradient, stream);
  }
}

void adam_step_cuda(const Tensor& weight, std::vector<Tensor> state, const Tensor& gradient,
                    std::vector<double> rates, std::vector<int64_t> rule) {
  check_dim(kOp, "weight", weight, 2);
  check_float(kOp, "weight", weight);
  check_float(kOp, "gradient", gradient);
  check_shape(kOp, "gradient", gradient, {weight.size(0), weight.size(1)});
  check_device(kOp, "weight", weight, weight);
  check_device(kOp, "gradient", gradient, weight);
  AdamView view;
  adam_view(kOp, "weight", weight, state, rates, rule, &view);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  adam_step_rows(kOp, view, gradient, current_stream(kOp, weight));
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CUDA, m) {
  m.impl("adam_step_", TORCH_BOX(&adam_step_cuda));
}

}  // namespace gemmascope_fast
