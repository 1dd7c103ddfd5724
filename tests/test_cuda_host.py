"""Host code of csrc/cuda on a CUDA runtime of a few lines: it runs where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_host import build, missing, output

if missing():
    pytest.skip(missing(), allow_module_level=True)

PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include "cuda/runtime.h"
// Last: it brings CUDA's words for the compiler.
#include "cuda/feature_pass_launch.cuh"
using namespace gemmascope_fast;

void kernel(FeaturePass) {}

cudaError_t launch(int64_t bytes) {
  FeatureShape shape = {};
  shape.threads = 32;
  shape.bytes = bytes;
  return launch_feature_kernel(&kernel, 1, shape, nullptr, FeaturePass{});
}

// The largest that feature_shape gives.
int64_t most() { return kOptin - int64_t(sizeof(FeatureShared)) - kFinishShared; }

template <class Call>
void told(const Call& call) {
  try {
    call();
    std::puts("no error");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}

int main(int, char** argv) {
  if (strcmp(argv[1], "threads") == 0) {
    bool other = false;
    after_set = [&] {
      if (other) return;
      other = true;
      if (launch(1024) != cudaSuccess) std::puts("the small launch failed");
    };
    if (launch(most()) != cudaSuccess) std::puts("the large launch failed");
    return 0;
  }
  if (strcmp(argv[1], "old") == 0) {
    major = 7;
    told([] { check_capability("decode", 1); });
    major = 8;
    told([] { check_capability("decode", 1); });
    told([] { check_cuda("decode", "launch", cudaErrorNoKernelImageForDevice); });
    return 0;
  }
  if (strcmp(argv[1], "readback") == 0) {
    int64_t sizes[2] = {7, 8}, found[2] = {}, flags[600] = {}, all[600] = {};
    flags[599] = 9;
    Readback read("decode", nullptr);
    read.read(&found[1], &sizes[1], 8);
    read.read(all, flags, sizeof(all));  // more than a page
    read.read(&found[0], &sizes[0], 8);
    std::printf("%zu queued, %zu ", queued.size(), size_t(found[0] + found[1]));
    read.wait();
    std::printf("%d %d %d\n", int(found[0]), int(found[1]), int(all[599]));
    sizes[0] = 5;
    read.read(&found[0], &sizes[0], 8);
    read.wait();
    std::printf("%d, %zu pages\n", int(found[0]), locked.size());
    return 0;
  }
  if (strcmp(argv[1], "pages") == 0) {
    int64_t late = 7, size = 8, found = 0, other = 0;
    const auto read = [&](const int64_t& from, int64_t* to) {
      Readback sizes("decode", nullptr);
      sizes.read(to, &from, 8);
      sizes.wait();
    };
    captured = true;
    std::thread([&] { read(size, &found); }).join();
    std::thread([&] { read(size, &found); }).join();
    std::printf("%d, %zu pages, ", int(found), locked.size());
    { Readback("decode", nullptr).read(&other, &late, 8); }  // and the op fails
    const auto stale = std::move(queued);
    queued.clear();
    Readback sizes("decode", nullptr);
    sizes.read(&found, &size, 8);
    for (const auto& copy : queued) copy();
    queued = stale;
    sizes.wait();
    std::printf("%d %d, %d\n", int(found), int(other), int(capture_mode));
    return 0;
  }
  told([] { check_cuda("first", "launch", launch(most() + 1)); });
  check_launch("second");
}
"""

# The driver's part, and encode_sm90.cu and sm90_device.cpp as a C++ compiler reads them.
SM90 = r"""
#include <cstdio>
#include <cstring>
#include "cuda_runtime_api.h"
#include "cuda/encode_sm90.cu"
#include "cuda/sm90_device.cpp"
using namespace gemmascope_fast;

bool serves() {
  alignas(16) static char rows[16];
  EncodeTiles p = {};
  p.x = p.W = rows;
  p.n = p.d_sae = p.last = 1;
  p.d = p.x_stride = p.W_stride = 8;
  return encode_sm90_serves(p, Dtype::kBFloat16, Limit::kPerToken);
}

int main(int, char** argv) {
  const auto ask = [] { std::printf("%d%d ", serves(), cudaGetLastError() != cudaSuccess); };
  if (strcmp(argv[1], "failing") == 0) {
    for (int i = 0; i < 9; ++i) {  // three attributes, the driver's function, five kernels
      failing = questions + i + 1;
      ask();
    }
    ask();
    return 0;
  }
  if (strcmp(argv[1], "other") == 0) minor = 3;
  if (strcmp(argv[1], "unbuilt") == 0) registers = 4;
  ask();
  minor = 0;
  registers = 168;
  const int before = questions;
  ask();
  std::printf("%d", questions - before);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("host"), PROGRAM, "cuda/runtime.cpp")


@pytest.fixture(scope="module")
def sm90(tmp_path_factory: pytest.TempPathFactory) -> Path:
    emulation = "testing/cuda_fibers.cpp", "testing/cuda_stacks.cpp"
    return build(tmp_path_factory.mktemp("sm90"), SM90, *emulation)


def test_a_reported_error_is_not_reported_again(program: Path) -> None:
    # Else the next op in this thread would fail, whatever it does.
    text = "first: launch: cudaErrorInvalidValue: invalid argument\n"
    assert output(program, "errors") == text


def test_several_numbers_cost_one_wait(program: Path) -> None:
    # What is larger than a page is copied at once.
    assert output(program, "readback") == "2 queued, 0 7 8 9\n5, 1 pages\n"


def test_a_page_serves_threads_in_turn_but_not_beside_a_copy_that_nobody_waited_for(
    program: Path,
) -> None:
    # Another thread captures a CUDA graph meanwhile.
    assert output(program, "pages") == "8, 1 pages, 8 0, 0\n"


def test_threads_that_launch_one_kernel_do_not_lower_each_others_limit(program: Path) -> None:
    assert output(program, "threads") == ""


def test_a_device_without_kernels_is_named(program: Path) -> None:
    assert output(program, "old").splitlines() == [
        "decode: cuda:1 (Tesla V100, compute capability 7.0) is too old: the CUDA kernels need "
        "compute capability 8.0; move the tensors to the CPU, or set "
        "GEMMASCOPE_FAST_BACKEND=reference",
        "no error",
        "decode: launch: this build has no kernels for cuda:0 (Tesla V100, compute capability "
        "8.0); build it with CUDAARCHS of that capability, or set GEMMASCOPE_FAST_BACKEND=triton",
    ]


def test_a_question_that_failed_is_asked_again(sm90: Path) -> None:
    # Each of the first calls fails at a later question, and leaves no error; then all are answered.
    assert output(sm90, "failing").split() == ["00"] * 9 + ["10"]


@pytest.mark.parametrize("device, answer", [("hopper", "10"), ("other", "00"), ("unbuilt", "00")])
def test_a_device_is_asked_once(sm90: Path, device: str, answer: str) -> None:
    assert output(sm90, device).split() == [answer, answer, "0"]
