"""Compiles host code of csrc/cuda for a CUDA runtime of a few lines, which runs without a GPU."""

from __future__ import annotations

import re
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
enum { cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
enum { cudaHostAllocPortable };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
constexpr int kOptin = 232448;

inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> limits;         // of dynamic shared memory
inline std::function<void()> after_set = [] {};  // what another thread does
inline int major = 9, minor = 0;                 // compute capability of the device
inline int processors = 132;
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
           : attribute == cudaDevAttrMultiProcessorCount    ? processors
                                                            : kOptin;
  return answer();
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {"Tesla V100", major, minor};
  return answer();
}
inline int own_shared = 6400;  // bytes that kernels have without asking, at least
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > kOptin - own_shared) return remember(cudaErrorInvalidValue);
    limits[kernel] = value;
    after_set();
  }
  return cudaSuccess;
}
inline int registers = 168;
struct cudaFuncAttributes {
  int numRegs;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->numRegs = registers;
  return answer();
}
// What a launch does; nothing where the kernel is not here.
inline std::map<const void*, std::function<void(dim3, dim3, void**, size_t)>> kernels;
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t bytes, void*) {
  const bool fits = bytes <= size_t(limits.count(kernel) ? limits[kernel] : 49152);
  if (fits && kernels.count(kernel)) kernels[kernel](grid, block, arguments, bytes);
  return remember(fits ? cudaSuccess : cudaErrorInvalidValue);
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  void* stream;
};
inline cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};
enum { cudaEnableDefault };
inline void* encode_map = &registers;  // cuTensorMapEncodeTiled
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, int, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *found = encode_map;
  *result = cudaDriverEntryPointSuccess;
  return answer();
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
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  return memset(to, value, bytes), cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaStreamCaptureStatus capture_status = cudaStreamCaptureStatusNone;  // of all streams
inline cudaError_t cudaStreamIsCapturing(void*, cudaStreamCaptureStatus* status) {
  *status = capture_status;
  return cudaSuccess;
}
inline int waits = 0;
inline cudaError_t copy_queued(size_t count) {
  ++waits;
  for (size_t i = 0; i < count; ++i) queued[i]();
  queued.erase(queued.begin(), queued.begin() + count);
  return remember(cudaSuccess);
}
inline cudaError_t cudaStreamSynchronize(void*) { return copy_queued(queued.size()); }
using cudaEvent_t = size_t*;  // copies queued before it
enum { cudaEventDisableTiming };
inline int events = 0, made = 0;  // that nobody destroyed; all
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ++events, ++made;
  *event = new size_t;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, void*) {
  *event = queued.size();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return copy_queued(*event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  --events;
  delete event;
  return cudaSuccess;
}
"""


DRIVER = r"""
#pragma once
#include <cstdint>
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
};
enum {
  CU_TENSOR_MAP_INTERLEAVE_NONE,
  CU_TENSOR_MAP_SWIZZLE_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
  CUDA_SUCCESS
};
struct CUtensorMap;
int cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, int, void*, const cuuint64_t*,
                           const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, int, int, int,
                           int);
"""


def missing() -> str:
    """Why nothing can be compiled here, or ''."""
    return "" if COMPILER and CSRC.exists() else "no C++ compiler, or no sources"


def translated(name: str, *changes: tuple[str, str]) -> str:
    """A source as a C++ compiler reads it: launches are calls."""
    text = re.sub(
        r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?), ([^,<>]*), (0|static_cast<size_t>\(shared\)),\s*"
        r"(?:call\.)?stream>>>\(",
        r"cuda_on_cpu::launch<\1>(dim3(\2), dim3(\3), \4, ",
        (CSRC / "cuda" / name).read_text(),
        flags=re.S,
    )
    assert "<<<" not in text
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def build(
    folder: Path,
    program: str,
    *sources: str | Path,
    options: tuple[str, ...] = (),
    first: str = "",
) -> Path:
    """`program` and sources, those of csrc by their names there; `first` is included by all."""
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    (folder / "cuda.h").write_text(DRIVER)
    (folder / "main.cpp").write_text(program)
    includes = [folder, CSRC, TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    libraries = [TORCH / "lib" / f"lib{name}.so" for name in ("torch_cpu", "c10")]
    compiler = [COMPILER, *options, "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    compiler += [f"-I{path}" for path in includes]
    if first:  # read once, for all sources
        output(*compiler, "-x", "c++-header", folder / first, "-o", folder / f"{first}.gch")
        compiler += ["-include", first]
    made = ["-o", folder / "main", *libraries, "-ldl", f"-Wl,-rpath,{TORCH / 'lib'}"]
    output(*compiler, folder / "main.cpp", *(CSRC / source for source in sources), *made)
    return folder / "main"


def output(*command: str | Path) -> str:
    """What a command prints that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
