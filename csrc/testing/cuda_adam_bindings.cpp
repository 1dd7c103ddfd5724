// The optimizer's device code on the CPU: its plain arithmetic element by element, and the kernels of adam_step_.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda/adam_step_kernel.cuh"
#include "testing/cuda_adam_matrix.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void require(bool ok, const char* message) {
  if (!ok) throw py::value_error(message);
}

Array<uint32_t> random_words(uint64_t seed, uint64_t row, uint64_t step, int64_t quads) {
  Array<uint32_t> out(4 * quads);
  for (int64_t q = 0; q < quads; ++q) {
    const RandomQuad quad = random_quad({seed, row, step}, static_cast<uint32_t>(q));
    std::copy(quad.word, quad.word + 4, out.mutable_data() + 4 * q);
  }
  return out;
}

Array<uint16_t> rounded(const Array<float>& w, const Array<uint32_t>& random) {
  require(w.size() == random.size(), "sizes differ");
  Array<uint16_t> out(w.size());
  for (py::ssize_t i = 0; i < w.size(); ++i) {
    out.mutable_data()[i] = round_stochastically(w.data()[i], random.data()[i]);
  }
  return out;
}

// of(a, b, c) element by element.
template <class Of>
Array<float> each(const Array<float>& a, const Array<float>& b, const Array<float>& c, Of of) {
  require(a.size() == b.size() && a.size() == c.size(), "sizes differ");
  Array<float> out(a.size());
  float* to = out.mutable_data();
  for (py::ssize_t i = 0; i < a.size(); ++i) to[i] = of(a.data()[i], b.data()[i], c.data()[i]);
  return out;
}

Array<float> roots(const Array<float>& v, const Array<float>& y) {
  return each(v, y, y, [](float a, float start, float) { return root_from(a, start); });
}

Array<float> reciprocals(const Array<float>& b, const Array<float>& y) {
  return each(b, y, y, [](float a, float start, float) { return better_reciprocal(a, start); });
}

Array<float> quotients(const Array<float>& a, const Array<float>& b, const Array<float>& y) {
  return each(a, b, y, quotient_from);
}

Array<float> decoded(const Array<uint8_t>& codes, const Array<uint8_t>& exponents) {
  require(codes.size() == exponents.size(), "sizes differ");
  Array<float> out(codes.size());
  for (py::ssize_t i = 0; i < codes.size(); ++i) {
    out.mutable_data()[i] = decode_moment(codes.data()[i], exponents.data()[i]);
  }
  return out;
}

// One block of up to 128 moments.
py::tuple encoded(const Array<float>& v, const Array<uint32_t>& random) {
  require(v.size() == random.size() && v.size() <= kMomentColumns, "one block, sizes differ");
  uint32_t largest = 0;
  for (py::ssize_t i = 0; i < v.size(); ++i) largest = std::max(largest, moment_bits(v.data()[i]));
  const int exponent = moment_exponent(largest);
  Array<uint8_t> codes(v.size());
  for (py::ssize_t i = 0; i < v.size(); ++i) {
    codes.mutable_data()[i] = encode_moment(moment_bits(v.data()[i]), exponent, random.data()[i]);
  }
  return py::make_tuple(codes, exponent);
}

// threads: 64 to 256 of a block that takes a row, or 0: rows in slabs. As adam_step.cu, in its shortest form.
void adam_step(const std::vector<py::object>& matrix, const py::array& gradient, int dtype,
               const std::vector<double>& rates, const std::vector<int64_t>& rule, int threads) {
  const AdamView a = adam_view_of(matrix, rates, rule);
  require(gradient.ndim() == 2 && gradient.shape(0) == a.rows && gradient.shape(1) == a.cols &&
              gradient.itemsize() == (dtype == kFloat32 ? 4 : 2) &&
              (a.cols < 2 || gradient.strides(1) == gradient.itemsize()),
          "gradient must have the weight's shape, and contiguous rows");
  if (a.rows == 0 || a.cols == 0) return;
  const AdamGradient g = {gradient.data(), gradient.strides(0) / gradient.itemsize(), dtype};
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(a.rows, 5));  // so that they loop
  if (threads != 0) {
    require(a.cols <= kAdamLargestRow && threads % 32 == 0 && threads >= 64 && threads <= 256,
            "64 to 256 threads");
    return cuda_on_cpu::launch<adam_step_kernel<256>>(
        blocks, threads, static_cast<size_t>(adam_row_bytes(a.cols)), a, g);
  }
  std::vector<int32_t> found(static_cast<size_t>(a.rows), 0);
  std::vector<int64_t> before(static_cast<size_t>(a.rows), -1);
  std::vector<float> sums(static_cast<size_t>(3 * a.rows * column_blocks(a)), NAN);
  const AdamSlabs s = {(a.cols + kSlab - 1) / kSlab, found.data(), before.data(), sums.data()};
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(a.rows * s.slabs, 7));
  constexpr int kBlock = kSlabThreads;
  cuda_on_cpu::launch<adam_slab_kernel<SlabWork::kLook>>(grid, kBlock, 0, a, g, s);
  if (a.remove_parallel) {
    cuda_on_cpu::launch<adam_slab_kernel<SlabWork::kSums>>(grid, kBlock, 0, a, g, s);
  }
  if (a.unit_norm) {
    cuda_on_cpu::launch<adam_slab_kernel<SlabWork::kMeasure>>(grid, kBlock, 0, a, g, s);
  }
  cuda_on_cpu::launch<adam_slab_kernel<SlabWork::kStore>>(grid, kBlock, 0, a, g, s);
}

const BindLater later([](py::module_& m) {
  m.def("adam_random_words", &random_words, py::arg("seed"), py::arg("row"), py::arg("step"),
        py::arg("quads"));
  m.def("adam_rounded", &rounded, py::arg("w"), py::arg("random"));
  m.def("adam_roots", &roots, py::arg("v"), py::arg("near"));
  m.def("adam_reciprocals", &reciprocals, py::arg("b"), py::arg("near"));
  m.def("adam_quotients", &quotients, py::arg("a"), py::arg("b"), py::arg("near"));
  m.def("adam_decoded", &decoded, py::arg("codes"), py::arg("exponents"));
  m.def("adam_encoded", &encoded, py::arg("v"), py::arg("random"));
  m.def("exact_power", &exact_power, py::arg("beta"), py::arg("k"));
  m.def("adam_power", &adam_power, py::arg("beta"), py::arg("k"));
  m.def("cuda_adam_step", &adam_step, py::arg("matrix"), py::arg("gradient"), py::arg("dtype"),
        py::arg("rates"), py::arg("rule"), py::arg("threads"));
});

}  // namespace
}  // namespace gemmascope_fast
