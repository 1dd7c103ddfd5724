"""Host code of csrc/cuda on a CUDA runtime of a few lines: it runs where there is no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parent.parent / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")

if COMPILER is None or not CSRC.exists():
    pytest.skip("no C++ compiler, or no sources", allow_module_level=True)

RUNTIME = r"""
#pragma once
#include <functional>
#include <map>
#include "testing/cuda_types.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaSharedmemCarveoutMaxShared };
using cudaStream_t = void*;
constexpr int kOptin = 232448;

inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> limits;         // of dynamic shared memory
inline std::function<void()> after_set = [] {};  // what another thread does

inline cudaError_t remember(cudaError_t e) { return e == cudaSuccess ? e : last_error = e; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = kOptin;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    // What a kernel has of its own counts as well; 6400 bytes is less than any has.
    if (value > kOptin - 6400) return remember(cudaErrorInvalidValue);
    limits[kernel] = value;
    after_set();
  }
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t bytes, void*) {
  const bool fits = bytes <= size_t(limits.count(kernel) ? limits[kernel] : 49152);
  return remember(fits ? cudaSuccess : cudaErrorInvalidValue);
}
"""

PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <stdexcept>
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
  try {
    check_cuda("first", "launch", launch(most() + 1));
    std::puts("no error");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
  check_launch("second");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    (folder / "main.cpp").write_text(PROGRAM)
    includes = [folder, CSRC, TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    libraries = [TORCH / "lib" / f"lib{name}.so" for name in ("torch_cpu", "c10")]
    command = [COMPILER, "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{path}" for path in includes]
    command += [folder / "main.cpp", CSRC / "cuda" / "runtime.cpp", "-o", folder / "main"]
    command += [*libraries, "-ldl", f"-Wl,-rpath,{TORCH / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_reported_error_is_not_reported_again(program: Path) -> None:
    # Else the next op in this thread would fail, whatever it does.
    text = "first: launch: cudaErrorInvalidValue: invalid argument\n"
    assert output(program, "errors") == text


def test_threads_that_launch_one_kernel_do_not_lower_each_others_limit(program: Path) -> None:
    assert output(program, "threads") == ""
