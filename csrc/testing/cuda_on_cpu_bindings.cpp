// Runs the kernels of cuda_specimens.cuh, for test_cuda_on_cpu.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "testing/cuda_specimens.cuh"
#include "testing/registry.h"

namespace cuda_on_cpu {
namespace {

namespace py = pybind11;
template <class T>
py::array_t<T> filled(py::ssize_t size, T value) {
  py::array_t<T> result(size);
  std::fill_n(result.mutable_data(), size, value);
  return result;
}

using Ints = py::array_t<int, py::array::c_style | py::array::forcecast>;

Ints reverse(const Ints& in, bool dynamic, bool barrier) {
  Ints out = filled<int>(in.size(), -2);
  const unsigned blocks = static_cast<unsigned>(in.size()) / kThreads;
  const auto run = [&](auto kernel) {
    launch_named("reverse_kernel", kernel, blocks, kThreads, dynamic ? kThreads * sizeof(int) : 0,
                 in.data(), out.mutable_data());
  };
  if (dynamic) {
    barrier ? run(&reverse_kernel<false, true>) : run(&reverse_kernel<false, false>);
  } else {
    barrier ? run(&reverse_kernel<true, true>) : run(&reverse_kernel<true, false>);
  }
  return out;
}

Ints running_sums(const Ints& in, bool barrier) {
  Ints out = filled<int>(kThreads, -2);
  const int rounds = static_cast<int>(in.size()) / kThreads;
  launch_named("running_sums_kernel",
               barrier ? &running_sums_kernel<true> : &running_sums_kernel<false>, 1, kThreads, 0,
               in.data(), out.mutable_data(), rounds);
  return out;
}

void wrong(const std::string& name) {
  static const std::vector<std::pair<std::string, Wrong>> all = {
      {"lane skips", Wrong::kLaneSkips},
      {"lane ended", Wrong::kLaneEnded},
      {"other collective", Wrong::kOtherCollective},
      {"other mask", Wrong::kOtherMask},
      {"not named", Wrong::kNotNamed},
      {"barrier skipped", Wrong::kBarrierSkipped},
      {"two barriers", Wrong::kTwoBarriers},
      {"barrier against warp", Wrong::kBarrierAgainstWarp},
      {"named barrier", Wrong::kNamedBarrier},
      {"trap", Wrong::kTrap},
      {"outside", Wrong::kOutside},
  };
  std::vector<int> out(32);
  for (const auto& [known, which] : all) {
    if (known == name) return launch<wrong_kernel>(2, kThreads, 0, which, out.data());
  }
  throw py::value_error(name);
}

py::array_t<float> widen(const py::array_t<uint16_t>& in, bool half) {
  py::array_t<float> out(in.size());
  for (py::ssize_t i = 0; i < in.size(); ++i) {
    const unsigned short bits = in.data()[i];
    out.mutable_data()[i] =
        half ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
  }
  return out;
}

py::array_t<uint16_t> narrow(const py::array_t<float>& in, bool half) {
  py::array_t<uint16_t> out(in.size());
  for (py::ssize_t i = 0; i < in.size(); ++i) {
    const float value = in.data()[i];
    out.mutable_data()[i] = half ? __half_as_ushort(__float2half_rn(value))
                                 : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  return out;
}

const gemmascope_fast::BindLater later([](py::module_& module) {
  py::module_ m = module.def_submodule("cuda_on_cpu");
  m.def("reverse", &reverse, py::arg("input"), py::arg("dynamic"), py::arg("barrier"));
  m.def("running_sums", &running_sums, py::arg("input"), py::arg("barrier"));
  m.def("wrong", &wrong);
  m.def("widen", &widen, py::arg("bits"), py::arg("half"));
  m.def("narrow", &narrow, py::arg("values"), py::arg("half"));
  m.def("unwritten", [](unsigned blocks) {
    auto out = filled<unsigned>(kThreads, 7);
    launch<unwritten_kernel>(blocks, kThreads, kThreads * 4, out.mutable_data());
    return out;
  });
  m.def("lost_updates", [] {
    int count = 0;
    launch<lost_update_kernel>(1, kThreads, 0, &count);
    return count;
  });
  m.def("claims", [] {
    auto out = filled<unsigned>(kThreads, ~0u);
    unsigned next = 0;
    launch<claim_kernel>(1, kThreads, 0, &next, out.mutable_data());
    return out;
  });
  m.def("hand_over", [] {
    Ints out = filled<int>(32, -2);
    launch<hand_over_kernel>(2, kThreads, 0, out.mutable_data());
    return out;
  });
  m.def("collectives", [](const py::array_t<unsigned>& in) {
    if (in.size() != 32) throw py::value_error("32 numbers");
    py::array_t<int64_t> out({21, 32});
    launch<collectives_kernel>(1, 32, 0, in.data(), out.mutable_data());
    return out;
  });
  m.def("atomics", [](const Ints& in, const Ints& start) {
    if (in.size() % 32 != 0 || start.size() != 12) throw py::value_error("sizes");
    Ints out(12, start.data());
    launch<atomics_kernel>(static_cast<unsigned>(in.size() / 32), 32, 0, in.data(),
                           out.mutable_data());
    return out;
  });
  m.def("places", [] {
    Ints out = filled<int>(3 * 5 * 2 * 64, 0);
    launch<place_kernel>(dim3(3, 5, 2), dim3(4, 8, 2), 0, out.mutable_data());
    return out;
  });
});

}  // namespace
}  // namespace cuda_on_cpu
