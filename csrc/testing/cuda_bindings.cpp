// The device code of csrc/cuda on the CPU (cuda_on_cpu.h), over numpy arrays. Each op's host code is repeated here in
// its shortest form; outputs begin full of 0xAB, as memory that an allocator hands out is full of anything.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <numeric>

#include "cuda/by_feature_kernel.cuh"
#include "testing/cuda_on_cpu.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<T> new_array(std::vector<py::ssize_t> shape) {
  py::array_t<T> result(std::move(shape));
  memset(result.mutable_data(), 0xAB, static_cast<size_t>(result.nbytes()));
  return result;
}

py::tuple by_feature(const Array<int64_t>& offsets, const Array<int32_t>& indices, int64_t d_sae) {
  const int64_t capacity = indices.size();
  if (offsets.size() < 1 || d_sae < 0) throw py::value_error("offsets [n + 1], d_sae >= 0");
  auto keys = new_array<uint32_t>({2 * capacity});
  auto positions = new_array<int64_t>({capacity});
  auto feature_offsets = new_array<int64_t>({d_sae + 1});
  auto permutation = new_array<int64_t>({capacity});
  ByFeature p;
  p.offsets = offsets.data();
  p.indices = indices.data();
  p.n = offsets.size() - 1;
  p.capacity = capacity;
  p.d_sae = d_sae;
  p.keys = keys.mutable_data();
  p.positions = positions.mutable_data();
  p.feature_offsets = feature_offsets.mutable_data();
  p.permutation = permutation.mutable_data();

  const unsigned blocks = std::min(by_feature_blocks(capacity), 3u);  // so that threads loop
  cuda_on_cpu::launch<by_feature_keys_kernel>(blocks, kByFeatureThreads, 0, p);
  // In place of CUB's sort, and as blind as it to the bits above the key's.
  const uint32_t key = static_cast<uint32_t>((uint64_t{1} << by_feature_key_bits(d_sae)) - 1);
  std::iota(p.permutation, p.permutation + capacity, int64_t{0});
  std::stable_sort(p.permutation, p.permutation + capacity,
                   [&](int64_t a, int64_t b) { return (p.keys[a] & key) < (p.keys[b] & key); });
  for (int64_t e = 0; e < capacity; ++e) {
    p.keys[capacity + e] = p.keys[p.permutation[e]];
    p.permutation[e] = p.positions[p.permutation[e]];
  }
  cuda_on_cpu::launch<by_feature_bounds_kernel>(std::min(by_feature_blocks(d_sae + 1), 3u),
                                                kByFeatureThreads, 0, p);
  cuda_on_cpu::launch<by_feature_padding_kernel>(blocks, kByFeatureThreads, 0, p);
  return py::make_tuple(feature_offsets, permutation);
}

const BindLater later([](py::module_& m) {
  m.def("cuda_seed", &cuda_on_cpu::set_seed, py::arg("seed"));
  m.def("cuda_by_feature", &by_feature, py::arg("offsets"), py::arg("indices"), py::arg("d_sae"));
});

}  // namespace
}  // namespace gemmascope_fast
