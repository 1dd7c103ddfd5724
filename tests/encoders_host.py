"""The encoders of csrc/cuda as ops on CPU tensors: host code and kernels, those of Hopper too.

Every source is compiled as it is, but for launches, which the emulator runs, and for what only CUDA
tensors can answer. First arenas and chunks are small, so that small problems overflow them.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch
from cuda_host import build, translated

from gemmascope_fast import ops

NAMESPACE = "cuda_on_cpu"
ENCODERS = ("jumprelu_encode", "topk_encode", "batchtopk_encode")
OPTIONS = ("-fPIC", "-O1", "-fvisibility=hidden", "-ffp-contract=off")

Changes = tuple[tuple[str, str], ...]
STREAM = "  static const GetStream get_stream"
SOURCES: dict[str, Changes] = {
    "jumprelu_encode.cu": (("per_token * n, 65536", "n * d_sae / 64, 128"),),
    "topk_encode.cu": (),
    "batchtopk_encode.cu": (),
    "pack_encoder.cu": (),
    # Kernels of one 16-bit type: others test both, and they take long to compile.
    "encode_tiles.cu": (
        ("return tile_kernel<__half, Shape>", "return tile_kernel<__nv_bfloat16, Shape>"),
    ),
    "encode_few.cu": (
        ("kernel_of<__half>(limit)", "kernel_of<__nv_bfloat16>(limit)"),
        ("&few_keys_kernel<__half>", "&few_keys_kernel<__nv_bfloat16>"),
    ),
    "encode_sm90.cu": (
        ("kernel<__half, Limit::kPerLatent>", "kernel<__nv_bfloat16, Limit::kPerLatent>"),
        ("kernel<__half, Limit::kPerToken>", "kernel<__nv_bfloat16, Limit::kPerToken>"),
    ),
    "encode_screened.cu": (
        ("kRecordsPerToken = 256", "kRecordsPerToken = 2"),
        ("kSmallestArena = 65536", "kSmallestArena = 64"),
    ),
    "upper_bounds.cu": (),
    "topk_scan.cu": (),
    "topk_few.cu": (),
    "topk_screened.cu": (),
    "batchtopk_scan.cu": (),
    "batchtopk_screened.cu": (),
    "sm90_device.cpp": (),
    "runtime.cpp": ((STREAM, f"  if (!t.is_cuda()) return nullptr;\n{STREAM}"),),
}
HEADERS: dict[str, Changes] = {
    "operands.h": (("!like.is_cuda()", "false"), ("t.is_cuda() && ", "")),
    "select_prefixes.h": (("int64_t{1} << 22", "1"), ("int64_t{1} << 24", "int64_t{1} << 14")),
}

CUB = r"""
#pragma once
namespace cub {
struct DeviceScan {
  template <class T>
  static cudaError_t ExclusiveSum(void* workspace, size_t& bytes, T* from, T* to, int64_t size,
                                  cudaStream_t) {
    T sum = 0;
    for (int64_t i = 0; workspace != nullptr && i < size; ++i) {
      const T own = from[i];
      to[i] = sum;
      sum += own;
    }
    bytes = 8;
    return cudaSuccess;
  }
};
}  // namespace cub
"""

# In front of every source: the libraries, and behind them CUDA's words for the compiler.
PRELUDE = r"""
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>
#include "cuda_runtime_api.h"
#include "testing/cuda_on_cpu.h"
"""

PROGRAM = r"""
#include "cuda.h"
#include "common/check.h"
#include "cpu/encode_report.h"
#include "cuda/encode_few_kernel.cuh"
#include "cuda/encode_sm90_kernel.cuh"
#include "cuda/encode_tile_kernel.cuh"
#include "cuda/rescore_kernel.cuh"
#include "cuda/topk_few_kernel.cuh"
#include "cuda/topk_screened_kernel.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

int cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, int, void* data,
                           const cuuint64_t* sizes, const cuuint64_t* strides,
                           const cuuint32_t* box, const cuuint32_t*, int, int, int, int) {
  const int bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  *map = {data, bytes, int64_t(sizes[0]), int64_t(sizes[1]), int64_t(strides[0]) / bytes,
          int(box[0]), int(box[1])};
  return CUDA_SUCCESS;
}

namespace gemmascope_fast {

template <class... P, size_t... I>
void run(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t bytes,
         std::index_sequence<I...>) {
  cuda_on_cpu::launch_named("kernel", kernel, grid, block, bytes,
                            *static_cast<std::decay_t<P>*>(arguments[I])...);
}
template <class... P>
void add(void (*kernel)(P...)) {
  kernels[reinterpret_cast<const void*>(kernel)] = [=](dim3 grid, dim3 block, void** arguments,
                                                       size_t bytes) {
    run(kernel, grid, block, arguments, bytes, std::index_sequence_for<P...>{});
  };
}
template <class T, class Shape>
void add_tiles() {
  add(&encode_tile_kernel<T, Limit::kPerLatent, Shape>);
  add(&encode_tile_kernel<T, Limit::kPerToken, Shape>);
}
const bool added = [] {
  add(&few_keys_kernel<__nv_bfloat16>);
  add(&encode_few_kernel<__nv_bfloat16, Limit::kPerLatent>);
  add(&encode_few_kernel<__nv_bfloat16, Limit::kPerToken>);
  add(&encode_sm90_kernel<__nv_bfloat16, Limit::kPerLatent>);
  add(&encode_sm90_kernel<__nv_bfloat16, Limit::kPerToken>);
  add_tiles<__nv_bfloat16, SmallTile>();
  add_tiles<__nv_bfloat16, LargeTile>();
  add_tiles<float, SmallTile>();
  add_tiles<float, LargeTile>();
  add(&encode_sm90_kernel<int8_t, Limit::kScreened>);
  add(&encode_sm90_kernel<int8_t, Limit::kUpperBound>);
  add(&rescore_kernel<true>);
  add(&rescore_kernel<false>);
  add(&decide_rows_kernel<true>);
  add(&decide_rows_kernel<false>);
  encode_map = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  processors = 3;
  own_shared = 1152;  // of decide_rows_kernel
  return true;
}();

EncodeReport told;
void set_encode_report(const EncodeReport& report) { told = report; }
std::tuple<Tensor, Tensor> by_feature_cuda(const Tensor& offsets, const Tensor& indices, int64_t) {
  return {offsets, indices};
}

EXPORT const char* why_not_screened() { return told.why_direct; }
EXPORT int64_t decided() { return told.candidates; }
EXPORT int take_waits() { return std::exchange(waits, 0); }
EXPORT int events_left() { return events; }
EXPORT int take_events() { return std::exchange(made, 0); }
EXPORT void set_seed(uint64_t seed) { cuda_on_cpu::set_seed(seed); }
EXPORT void capture(bool active) {
  capture_status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

}  // namespace gemmascope_fast

"""


def load(folder: Path) -> Any:
    """Compiled in this folder; then the encoders and `pack_encoder` are `torch.ops.cuda_on_cpu`."""
    (folder / "cuda").mkdir()
    (folder / "cub" / "device").mkdir(parents=True)
    (folder / "cub" / "device" / "device_scan.cuh").write_text(CUB)
    (folder / "prelude.h").write_text(PRELUDE)
    for name, changes in HEADERS.items():
        (folder / "cuda" / name).write_text(translated(name, *changes))
    made = []
    for name, changes in SOURCES.items():
        text = translated(name, *changes)
        text = text.replace("(gemmascope_fast, CUDA, m)", f"({NAMESPACE}, CPU, m)")
        text = text.replace("(gemmascope_fast, m)", f"({NAMESPACE}, m)")
        text = text.replace("const torch::stable::accelerator::DeviceGuard guard", "(void)")
        made.append(folder / Path(name).with_suffix(".cpp"))
        made[-1].write_text(re.sub(r"!\w+(\.|->)is_cuda\(\) \|\| ", "", text))
    schemas = [f"{name}{ops.SCHEMAS[name]}" for name in ENCODERS]
    schemas.append("pack_encoder(Tensor W_enc, Tensor? center) -> Tensor")
    defined = "".join(f'  m.def("{schema}");\n' for schema in schemas)
    program = f"{PROGRAM}STABLE_TORCH_LIBRARY({NAMESPACE}, m) {{\n{defined}}}\n"
    made += ["testing/cuda_fibers.cpp", "testing/cuda_stacks.cpp"]
    library = build(folder, program, *made, options=(*OPTIONS, "-shared"), first="prelude.h")
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.why_not_screened.restype = ctypes.c_char_p
    loaded.decided.restype = ctypes.c_int64
    return loaded
