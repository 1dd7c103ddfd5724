"""Host code of the BatchTopK encoders on CUDA, plain and screened, over matrices of chosen numbers.

`pre` and `upper`, the most that each can be, take the place of the products; the scans, the
selections and what the screened encoder concludes are the library's own, kernels included, which
run on a CPU. Chunks are small, so that a small problem has several, and blocks of rows.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda_host import build, translated

PROGRAM = r"""
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include "cuda_runtime_api.h"
// Behind the libraries: it brings CUDA's words for the compiler.
#include "testing/cuda_on_cpu.h"
#include "batchtopk_scan.cu"
#include "batchtopk_screened.cu"
#include "batchtopk_encode.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace gemmascope_fast {
inline namespace on_cuda {
// What the products would find. A token's row of x holds its number.
struct Given {
  int64_t n, d_sae;
  const float *pre, *upper;
  const bool* coded;
  bool always;
} given;
struct Told {
  const char* why;
  int64_t decided;
} told;

Tensor tokens_of(const Tensor& t, int64_t begin, int64_t rows) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, begin, rows);
}
EncodeInputs EncodeInputs::of_rows(int64_t begin, int64_t rows) const {
  EncodeInputs part = *this;
  part.x = tokens_of(x, begin, rows);
  return part;
}
EncodeCsr emit(const float* matrix, int64_t begin, const Tensor& bound, Prefix chunk,
               int64_t capacity) {
  const int64_t rows = bound.size(0);
  const auto of = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_zeros(bound, {size}, dtype);
  };
  EncodeCsr csr = {of(rows + 1, ScalarType::Long), of(capacity, ScalarType::Int),
                   of(capacity, ScalarType::Float), {}, of(1, ScalarType::Long)};
  int64_t needed = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = chunk.first; j < chunk.last; ++j) {
      const float value = matrix[(begin + i) * given.d_sae + j];
      if (value <= data<float>(bound)[i]) continue;
      if (needed < capacity) {
        data<int32_t>(csr.indices)[needed] = static_cast<int32_t>(j);
        data<float>(csr.values)[needed] = value;
      }
      ++needed;
    }
    data<int64_t>(csr.offsets)[i + 1] = std::min(needed, capacity);
  }
  *data<int64_t>(csr.needed) = needed;
  return csr;
}
EncodeCsr encode_candidates(const char*, const EncodeInputs& in, const Tensor& bound, int64_t first,
                            int64_t last, int64_t capacity, cudaStream_t) {
  const int64_t begin = static_cast<int64_t>(*data<float>(in.x));
  return emit(given.pre, begin, bound, {first, last}, capacity);
}
UpperBounds::UpperBounds(const char*, const Tensor& x, const Tensor&, const ScreenedEncoder&,
                         const Tensor&, cudaStream_t) {
  given.bound = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  for (int64_t i = 0; i < x.size(0); ++i) {
    data<float>(given.bound)[i] = gemmascope_fast::given.coded[i] ? 1e7f : NAN;
  }
}
EncodeCsr UpperBounds::candidates(const char*, int64_t begin, const Tensor& least, Prefix chunk,
                                  int64_t capacity, cudaStream_t) const {
  return emit(gemmascope_fast::given.upper, begin, least, chunk, capacity);
}
void rescore(const char*, const Tensor&, const Tensor&, const Tensor&, const EncodeCsr& found,
             int64_t count, cudaStream_t) {
  const int64_t* offsets = data<int64_t>(found.offsets);
  if (offsets[given.n] != count) fail("rescore", "of ", offsets[given.n], " candidates ", count);
  for (int64_t i = 0; i < given.n; ++i) {
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      data<float>(found.values)[e] = given.pre[i * given.d_sae + data<int32_t>(found.indices)[e]];
    }
  }
}
const char* why_not_now(const Tensor&, const Tensor&, cudaStream_t) { return nullptr; }
bool screening_is(const char*) { return given.always; }
ScreenedEncoder screened_encoder(const char*, const Tensor& bytes, const Tensor&) {
  return {0, given.d_sae, 0, static_cast<char*>(bytes.data_ptr())};
}
void check_header(const char*, const ScreenedEncoder&, const ScreenedHeader& header) {
  if (header.magic != kScreenedMagic) fail("batchtopk_encode", "no codes");
}
void report_screened(const char*, const Tensor&, const Tensor&, const char* why,
                     const ScreenedHeader&, int64_t decided) {
  told = {why, decided};
}
void check_encode(const char*, const Tensor&, const Tensor&, const Tensor&) {}
EncodeInputs encode_inputs(const Tensor& x, const Tensor&, const Tensor& bias) {
  return {x, x, bias, Dtype::kFloat32};
}
}  // namespace on_cuda
std::tuple<Tensor, Tensor> by_feature_cuda(const Tensor& offsets, const Tensor&, int64_t) {
  return {offsets, offsets};
}
Tensor floats(int64_t rows, int64_t columns) {
  return torch::stable::empty({rows, columns}, ScalarType::Float);
}

// Arrays of `room` entries; returns their number, -1 where the screened encoder found none, or -2
// for an error.
EXPORT int64_t encode(Given problem, int64_t count, float least, bool screened, bool wrong,
                      int64_t room, int64_t* offsets, int32_t* latents, float* values, float* gate,
                      int64_t* needed, float* threshold, Told* report) try {
  given = problem;
  told = {"nothing was told", 0};
  waits = 0;
  const Tensor x = floats(given.n, 1), W = floats(1, given.d_sae), bytes = floats(1, 1024);
  const Tensor bias = torch::stable::new_zeros(x, {given.d_sae}, ScalarType::Float);
  for (int64_t i = 0; i < given.n; ++i) data<float>(x)[i] = static_cast<float>(i);
  const ScreenedHeader header = {wrong ? 0 : kScreenedMagic, 0, given.d_sae, 0, 0};
  std::memcpy(bytes.data_ptr(), &header, sizeof(header));
  BatchBest best(bias, given.n, given.d_sae, count);
  std::optional<float> guess;
  if (least > 0) guess = least;
  std::optional<int64_t> entries;
  if (screened) {
    entries = batchtopk_screened("op", x, W, bias, guess, bytes, best, nullptr);
    *report = told;
    if (!entries) entries = -1;
  }
  if (entries == -1 || !screened) {
    const int64_t plain = encode_plain(encode_inputs(x, W, bias), guess, false, best, nullptr);
    if (!screened) entries = plain;
  }
  const EncodeCsr out = write_entries("op", best, room, nullptr);
  const auto copy = [](auto* to, const Tensor& from) {
    std::memcpy(to, from.data_ptr(), static_cast<size_t>(from.numel()) * sizeof(*to));
  };
  copy(offsets, out.offsets);
  copy(latents, out.indices);
  copy(values, out.values);
  copy(gate, out.gate);
  copy(needed, out.needed);
  copy(threshold, best.threshold);
  return *entries;
} catch (const std::exception& error) {
  *report = {strdup(error.what()), 0};
  return -2;
}
EXPORT int last_waits() { return waits; }
}  // namespace gemmascope_fast
"""


def load(folder: Path) -> Any:
    """The encoders, compiled in this folder."""
    (folder / "cuda").mkdir()
    small = (("int64_t{1} << 22", "1"), ("int64_t{1} << 24", "int64_t{1} << 14"))
    (folder / "cuda/select_prefixes.h").write_text(translated("select_prefixes.h", *small))
    for name in ("batchtopk_scan.cu", "batchtopk_screened.cu", "batchtopk_encode.cu"):
        unregistered = re.sub(
            r"STABLE_TORCH_LIBRARY_IMPL.*?\n}\n", "", translated(name), flags=re.S
        )
        (folder / name).write_text(unregistered)
    sources = "testing/cuda_fibers.cpp", "testing/cuda_stacks.cpp", "cuda/runtime.cpp"
    made = build(
        folder, PROGRAM, *sources, options=("-shared", "-fPIC", "-O1", "-fvisibility=hidden")
    )
    loaded = ctypes.CDLL(str(made))
    loaded.encode.restype = ctypes.c_int64
    return loaded


class Given(ctypes.Structure):
    _fields_ = [
        *(("n", ctypes.c_int64), ("d_sae", ctypes.c_int64)),
        *(("pre", ctypes.c_void_p), ("upper", ctypes.c_void_p), ("coded", ctypes.c_void_p)),
        ("always", ctypes.c_bool),
    ]


class Told(ctypes.Structure):
    _fields_ = [("why", ctypes.c_char_p), ("decided", ctypes.c_int64)]


@dataclass
class Found:
    """`result` is as the op's; `why` and `decided` are what the screened encoder told."""

    result: list[torch.Tensor]
    why: str | None
    decided: int
    waits: int


@dataclass
class Batch:
    pre: np.ndarray
    upper: np.ndarray
    coded: np.ndarray
    always: bool = True

    def encode(
        self, library: Any, k: float, guess: float = 0.0, screened: bool = True, wrong: bool = False
    ) -> Found:
        n, d_sae = self.pre.shape
        count = min(int(k * n), n * d_sae + 1)
        pointers = (a.ctypes.data for a in (self.pre, self.upper, self.coded))
        given = Given(n, d_sae, *pointers, self.always)
        room = min(count, n * d_sae)
        offsets, latents = np.zeros(n + 1, np.int64), np.zeros(room, np.int32)
        values, gate = np.zeros(room, np.float32), np.zeros(room, np.float32)
        needed, threshold = np.zeros((), np.int64), np.zeros((), np.float32)
        out = (offsets, latents, values, gate, needed, threshold)
        told = Told()
        entries = library.encode(
            *(given, ctypes.c_int64(count), ctypes.c_float(guess), screened, wrong),
            *(ctypes.c_int64(room), *(a.ctypes.data_as(ctypes.c_void_p) for a in out)),
            ctypes.byref(told),
        )
        if entries == -2:
            raise RuntimeError((told.why or b"").decode())
        why = told.why.decode() if told.why else None
        stored = int(offsets[-1])
        assert entries == (-1 if why else stored) or not screened
        cut = [torch.from_numpy(a[:stored]) for a in (latents, values, gate)]
        empty = [torch.empty(0, dtype=torch.int64)] * 2
        result = [torch.from_numpy(offsets), *cut, torch.tensor(needed), torch.tensor(threshold)]
        return Found(result + empty, why, told.decided, library.last_waits())
