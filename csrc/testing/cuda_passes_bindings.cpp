// The device code of decode, pre_at and the backward ops on the CPU (cuda_on_cpu.h), over numpy arrays (cuda_passes.h).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda/entry_dots_kernel.cuh"
#include "cuda/feature_slabs.cuh"
#include "cuda/group_sums_kernel.cuh"
#include "cuda/latent_order_kernel.cuh"
#include "cuda/pre_at_kernel.cuh"
#include "cuda/token_pass_kernel.cuh"
#include "testing/cuda_passes.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

unsigned few(int64_t blocks) { return static_cast<unsigned>(blocks < 3 ? blocks : 3); }

void token_pass(const py::object& offsets, const py::object& indices,
                const py::object& coefficients, const py::object& gate, const Matrix& matrix,
                const py::object& bias, Matrix out, bool add) {
  TokenPass p;
  p.offsets = vector_of<int64_t>(offsets);
  p.indices = vector_of<int32_t>(indices);
  p.coefficients = vector_of<float>(coefficients);
  p.gate = vector_of<float>(gate);
  p.matrix = rows_of(matrix);
  p.bias = vector_of<float>(bias);
  p.out = target_of(out);
  p.n = p.out.rows;
  p.sets = p.n == 0 ? 0 : (size_of(offsets) - 1) / p.n;
  p.capacity = size_of(indices);
  p.add = add ? 1 : 0;
  const auto run = [&](auto access) {
    constexpr Access kAccess = decltype(access)::value;
    const unsigned blocks = few(token_pass_items(p, kAccess));  // so that blocks loop
    if (blocks > 0) cuda_on_cpu::launch<token_pass_kernel<kAccess>>(blocks, kTokenThreads, 0, p);
  };
  if (!p.matrix.wide) {
    run(std::integral_constant<Access, Access::kAny>());
  } else if (p.matrix.dtype == kFloat32) {
    run(std::integral_constant<Access, Access::k32>());
  } else {
    run(std::integral_constant<Access, Access::k16>());
  }
}

void pre_at(const Matrix& x, const Matrix& W, const py::object& bias, const py::object& rows,
            const py::object& latents, const py::object& out) {
  PreAt p;
  p.x = rows_of(x);
  p.W = rows_of(W);
  p.bias = vector_of<float>(bias);
  p.rows = vector_of<int64_t>(rows);
  p.latents = vector_of<int64_t>(latents);
  p.pairs = size_of(rows);
  p.pre = vector_of<float>(out);
  if (p.pairs > 0) {
    cuda_on_cpu::launch<pre_at_kernel>(few(pair_blocks(p.pairs)), kPairThreads, 0, p);
  }
}

void entry_dots(const py::object& offsets, const py::object& indices, const Matrix& W,
                const Matrix& g, const py::object& out) {
  EntryDots p;
  p.offsets = vector_of<int64_t>(offsets);
  p.indices = vector_of<int32_t>(indices);
  p.n = size_of(offsets) - 1;
  p.capacity = size_of(indices);
  p.W = rows_of(W);
  p.g = rows_of(g);
  p.out = vector_of<float>(out);
  if (p.capacity > 0) {
    cuda_on_cpu::launch<entry_dots_kernel>(few(pair_blocks(p.capacity)), kPairThreads, 0, p);
  }
}

void group_sums(const Matrix& later, const Matrix& own, const py::object& out) {
  cuda_on_cpu::launch<group_sums_kernel>(2, kGroupThreads, 0, rows_of(later), rows_of(own),
                                         vector_of<float>(out));
}

void latent_order(const py::dict& a, const py::object& records) {
  LatentOrder p;
  p.offsets = vector_of<int64_t>(a["offsets"]);
  p.feature_offsets = vector_of<int64_t>(a["feature_offsets"]);
  p.permutation = vector_of<int64_t>(a["permutation"]);
  p.values = vector_of<float>(a["values"]);
  p.gate = vector_of<float>(a["gate"]);
  p.d_values = vector_of<float>(a["gradient"]);
  p.m = size_of(a["offsets"]) - 1;
  p.d_sae = size_of(a["feature_offsets"]) - 1;
  p.capacity = size_of(a["permutation"]);
  p.records = reinterpret_cast<Record*>(vector_of<int32_t>(records));
  if (p.capacity > 0) cuda_on_cpu::launch<latent_order_kernel>(2, kOrderThreads, 0, p);
}

template <int K>
void run_pass(const FeaturePass& p, const FeatureShape& shape, const StoreGradients& gradients) {
  const auto bytes = static_cast<size_t>(shape.bytes);
  const unsigned windows = static_cast<unsigned>(feature_windows(p));
  if (windows > 0) {
    cuda_on_cpu::launch<feature_pieces_kernel<K>>(windows, shape.threads, bytes, p);
  }
  if (p.last == p.first) return;
  cuda_on_cpu::launch<feature_pass_kernel<K, StoreGradients>>(
      static_cast<unsigned>(p.last - p.first), shape.threads, bytes, p, gradients);
}

// One pass that fits into `shared` bytes of a block.
int run_fitting(FeaturePass p, const StoreGradients& gradients, int64_t shared) {
  const FeatureShape shape = feature_shape(p, shared, 64 * shared);
  if (shape.K == 0) return 0;
  std::vector<float> pieces(static_cast<size_t>(feature_windows(p) * feature_piece_size(p)), NAN);
  p.pieces = pieces.data();
  p.stages = shape.stages;
  if (shape.K == 1) run_pass<1>(p, shape, gradients);
  if (shape.K == 2) run_pass<2>(p, shape, gradients);
  if (shape.K == 3) run_pass<3>(p, shape, gradients);
  if (shape.K == 4) run_pass<4>(p, shape, gradients);
  return shape.K * 10 + shape.stages;
}

// The names are those of FeaturePass; matrices and targets that are absent leave their part out. Returns 10 K + stages
// of the (last) launch.
int feature_pass(const py::dict& a, int64_t shared, int64_t slab) {
  StoreGradients gradients = {};
  FeaturePass p = pass_of(a, &gradients);
  if (slab == 0) return run_fitting(p, gradients, shared);
  int shape = 0;
  store_in_slabs(p, gradients, slab, [&](const FeaturePass& part, const StoreGradients& out) {
    shape = run_fitting(part, out, shared);
    require(shape != 0, "a slab does not fit");
  });
  return shape;
}

const BindLater later([](py::module_& m) {
  m.def("cuda_token_pass", &token_pass);
  m.def("cuda_pre_at", &pre_at);
  m.def("cuda_entry_dots", &entry_dots);
  m.def("cuda_group_sums", &group_sums);
  m.def("cuda_latent_order", &latent_order);
  m.def("cuda_feature_pass", &feature_pass, py::arg("arguments"), py::arg("shared"),
        py::arg("slab"));
});

}  // namespace
}  // namespace gemmascope_fast
