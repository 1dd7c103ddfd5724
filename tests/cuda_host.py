"""Compiles host code of csrc/cuda for a CUDA runtime of a few lines, which runs without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

CSRC = Path(__file__).parent.parent / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")

RUNTIME = r"""
#pragma once
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <vector>
#include "testing/cuda_types.h"

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorNotSupported,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice
};
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaDeviceProp {
  char name[256];
  int major, minor;
};
using cudaStream_t = void*;
enum { cudaMemcpyDeviceToHost, cudaHostAllocPortable };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
constexpr int kOptin = 232448;

inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> limits;         // of dynamic shared memory
inline std::function<void()> after_set = [] {};  // what another thread does
inline int major = 9, minor = 0;                 // compute capability of the device
inline int questions = 0, failing = 0;           // asked so far; the one that fails

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
inline cudaError_t answer() {
  ++questions;
  return remember(questions == failing ? cudaErrorInvalidValue : cudaSuccess);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? major
           : attribute == cudaDevAttrComputeCapabilityMinor ? minor
                                                            : kOptin;
  return answer();
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {"Tesla V100", major, minor};
  return answer();
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

// Copies to page-locked memory are done when the stream is waited for, others at once.
inline std::map<const char*, size_t> locked;
inline std::vector<std::function<void()>> queued;
inline bool captured = false;  // by another thread
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** found, size_t bytes, unsigned) {
  if (captured && capture_mode != cudaStreamCaptureModeRelaxed) {
    return remember(cudaErrorNotSupported);
  }
  char* memory = new char[bytes];
  locked[memory] = bytes;
  *found = memory;
  return answer();
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  const char* at = static_cast<char*>(to);
  const auto part = locked.upper_bound(at);
  const bool waits =
      part == locked.begin() || at >= std::prev(part)->first + std::prev(part)->second;
  if (waits) {
    memcpy(to, from, bytes);
  } else {
    queued.push_back([=] { memcpy(to, from, bytes); });
  }
  return remember(cudaSuccess);
}
inline int waits = 0;
inline cudaError_t cudaStreamSynchronize(void*) {
  ++waits;
  for (const auto& copy : queued) copy();
  queued.clear();
  return remember(cudaSuccess);
}
"""


def missing() -> str:
    """Why nothing can be compiled here, or ''."""
    return "" if COMPILER and CSRC.exists() else "no C++ compiler, or no sources"


def build(folder: Path, program: str, *sources: str, options: tuple[str, ...] = ()) -> Path:
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    (folder / "cuda.h").write_text("")
    (folder / "main.cpp").write_text(program)
    includes = [folder, CSRC, TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    libraries = [TORCH / "lib" / f"lib{name}.so" for name in ("torch_cpu", "c10")]
    command = [COMPILER, *options, "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{path}" for path in includes]
    command += [folder / "main.cpp", *(CSRC / source for source in sources), "-o", folder / "main"]
    command += [*libraries, "-ldl", f"-Wl,-rpath,{TORCH / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
