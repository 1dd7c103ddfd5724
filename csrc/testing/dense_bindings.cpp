// The choice between passes and dense products (dense_work.h) over numbers, and ops that do nothing but call others
// through call_op: `gemmascope_fast_testing::<op>` calls `gemmascope_fast_scratch::<op>`; tests define both.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/call_op.h"
#include "common/dense_work.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;

template <const char* name, class Function>
struct Forward;
template <const char* name, class Result, class... Args>
struct Forward<name, Result(Args...)> {
  static Result run(Args... args) { return call_op(&run, name, args...); }
};

using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr char kDecode[] = "gemmascope_fast_scratch::decode";
using Decode = Forward<kDecode, Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       Maybe, Maybe, Maybe, ScalarType)>;

constexpr char kDecodeInto[] = "gemmascope_fast_scratch::decode_";
using DecodeInto =
    Forward<kDecodeInto, void(Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>;

constexpr char kSaeBackward[] = "gemmascope_fast_scratch::sae_backward";
using SaeBackward =
    Forward<kSaeBackward, std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
                              const Tensor&, const Tensor&, Maybe, double, const Tensor&,
                              const Tensor&, Ints, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, Maybe, Maybe, const Tensor&, const Tensor&, bool)>;

constexpr char kStep[] = "gemmascope_fast_scratch::fused_sparse_step";
using Step = Forward<kStep, std::tuple<Tensor, Tensor, Tensor>(
                                const Tensor&, const Tensor&, Maybe, double, const Tensor&,
                                const Tensor&, Ints, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, Maybe, Maybe, const Tensor&, const Tensor&, Tensors,
                                Tensors, Floats, Floats, Ints, Ints)>;

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast_testing, CPU, m) {
  m.impl("decode", TORCH_BOX(&Decode::run));
  m.impl("decode_", TORCH_BOX(&DecodeInto::run));
  m.impl("sae_backward", TORCH_BOX(&SaeBackward::run));
  m.impl("fused_sparse_step", TORCH_BOX(&Step::run));
}

const BindLater later([](py::module_& m) {
  py::class_<DenseWork>(m, "DenseWork")
      .def_readonly("gathered", &DenseWork::gathered)
      .def_readonly("moved", &DenseWork::moved)
      .def_readonly("operations", &DenseWork::operations)
      .def_readonly("wide", &DenseWork::wide);
  m.attr("DENSE_MARGIN") = kDenseMargin;
  m.attr("DENSE_SECONDS") = kDenseSeconds;
  m.attr("DENSE_CHUNK_BYTES") = kDenseChunkBytes;
  m.attr("DENSE_LARGEST_MATRIX") = kDenseLargestMatrix;
  m.def("sum_work", [](bool by_latent, int64_t capacity, int64_t n, int64_t features, int64_t d,
                       int matrix, int result) {
    return sum_work(by_latent ? Walk::kLatents : Walk::kTokens, capacity, n, features, d,
                    static_cast<Dtype>(matrix), static_cast<Dtype>(result));
  });
  m.def("dots_work", [](int64_t capacity, int64_t n, int64_t features, int64_t d, int W, int g) {
    return dots_work(capacity, n, features, d, static_cast<Dtype>(W), static_cast<Dtype>(g));
  });
  m.def("dense_pays",
        [](const Floats& numbers, double architecture, const std::vector<DenseWork>& works) {
          return dense_pays(rates_of(rates_table(numbers), architecture), works);
        });
});

}  // namespace
}  // namespace gemmascope_fast
