"""Host code of the BatchTopK encoders on CUDA, plain and screened, over matrices of chosen numbers.

`pre` and `upper`, the most that each can be, take the place of the products; the scans, the
selections and what the screened encoder concludes are the library's own, kernels included, which
run on a CPU. Chunks are small, so that a small problem has several, and blocks of rows.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_entries, assert_same, batchtopk_support
from test_cuda_host import CSRC, build

INF, NAN = float("inf"), float("nan")

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
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
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


def translated(name: str, *changes: tuple[str, str]) -> str:
    """A source as a C++ compiler reads it: launches are calls, nothing is registered with torch."""
    text = (CSRC / "cuda" / name).read_text()
    text = re.sub(
        r"(\w+)<<<(.*?), (\w+), 0,\s*stream>>>\(", r"cuda_on_cpu::launch<\1>(\2, \3, 0, ", text
    )
    text = re.sub(r"STABLE_TORCH_LIBRARY_IMPL.*?\n}\n", "", text, flags=re.S)
    assert "<<<" not in text
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("batchtopk")
    (folder / "cuda").mkdir()
    small = (("int64_t{1} << 22", "1"), ("int64_t{1} << 24", "int64_t{1} << 14"))
    (folder / "cuda/select_prefixes.h").write_text(translated("select_prefixes.h", *small))
    for name in ("batchtopk_scan.cu", "batchtopk_screened.cu", "batchtopk_encode.cu"):
        (folder / name).write_text(translated(name))
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


def draw(n: int, d_sae: int, margin: float = 0.3, seed: int = 0) -> Batch:
    """Gaussian pre-activations, and bounds that are up to `margin` above them."""
    g = np.random.default_rng(seed)
    pre = g.normal(size=(n, d_sae)).astype(np.float32)
    upper = (pre + margin * g.uniform(0.2, 1, (n, d_sae))).astype(np.float32)
    return Batch(pre, upper, np.ones(n, bool))


def assert_exact(batch: Batch, found: Found, k: float) -> None:
    expected, threshold = batchtopk_support(torch.from_numpy(batch.pre), k)
    assert_entries(found.result, expected)
    assert_same(found.result[5], torch.tensor(threshold), "threshold")
    assert found.result[4] == found.result[0][-1]


def cut_of(batch: Batch, k: float) -> float:
    return batchtopk_support(torch.from_numpy(batch.pre), k)[1]


PROBLEMS = [
    *((1, 40, 3.0, factor) for factor in (0.0, 1.0, 2.0, 0.01)),
    *((20, 1500, 7.3, factor) for factor in (0.0, 1.0, 1.1, 2.0, 0.01)),
    *((70, 600, 2.0, factor) for factor in (0.0, 1.1)),  # two blocks of rows
    (30, 300, 0.04, 0.0),
    (130, 300, 100.0, 0.0),  # more are kept than a chunk has room for
]
"""n, d_sae, k, and the guess as a part of the threshold, 0 for none."""


# ---- plain


@pytest.mark.parametrize(("n", "d_sae", "k", "factor"), PROBLEMS)
def test_plain(library: Any, n: int, d_sae: int, k: float, factor: float) -> None:
    batch = draw(n, d_sae)
    found = batch.encode(library, k, 0.9 * factor * cut_of(batch, k), screened=False)
    assert_exact(batch, found, k)
    overflows = 0 < factor < 1 and n > 1  # d_sae / 2 entries of a row exceed it, and 256 fit
    held = factor == 1.0 or factor == 1.1 or (factor == 0.01 and not overflows)
    assert found.waits == (1 if factor == 0.0 or held else 2)


# ---- screened


@pytest.mark.parametrize(("n", "d_sae", "k", "factor"), PROBLEMS)
def test_screened(library: Any, n: int, d_sae: int, k: float, factor: float) -> None:
    batch = draw(n, d_sae)
    found = batch.encode(library, k, 0.9 * factor * cut_of(batch, k))
    assert found.why is None
    assert_exact(batch, found, k)
    count = int(k * n)
    assert count <= found.decided <= (2 if factor == 2.0 else 1) * (2 * count + 32)
    sure_at_once = factor in (0.0, 1.0, 1.1) or (factor == 0.01 and n == 1)
    assert found.waits >= 4 if factor == 2.0 else not sure_at_once or found.waits == 2


def test_a_guess_with_too_few_uppers_above_it_is_no_proof(library: Any) -> None:
    """Entries below the guess are among the candidates, and those that are not may beat them."""
    batch = draw(40, 600)
    k, count = 4.0, 160
    cut = cut_of(batch, k)
    guess = 1.02 * cut
    batch.upper[:] = batch.pre
    batch.upper[batch.pre < cut] += 0.15  # many reach the guess by their bounds alone
    above = batch.pre[batch.upper > guess]
    assert (above > guess).sum() < count < len(above)
    found = batch.encode(library, k, guess)
    assert_exact(batch, found, k)
    assert found.waits == 4


@pytest.mark.parametrize("guessed", [False, True])
def test_bounds_that_do_not_decide_are_told(library: Any, guessed: bool) -> None:
    batch = draw(30, 900, margin=20.0)
    found = batch.encode(library, 5.0, 0.9 * cut_of(batch, 5.0) * guessed)
    assert found.why == "int8 codes leave the selection undecided"
    assert_exact(batch, found, 5.0)


def test_the_least_bound_kept_must_be_exceeded(library: Any) -> None:
    """Of 3 entries wanted 38 bounds are kept. Then one more that is equal to the cut: a tie."""
    batch = draw(3, 400)
    batch.pre[:] = -1.0
    batch.pre[0, :3] = 5.0
    batch.upper[:] = -0.5
    batch.upper[1, :38] = 4.0
    batch.upper[0, :3] = 5.5
    assert batch.encode(library, 1.0).why is None
    batch.upper[1, :38] = 5.0
    found = batch.encode(library, 1.0)
    assert found.why == "int8 codes leave the selection undecided"
    assert_exact(batch, found, 1.0)
    batch.upper[1, 34:] = 4.0  # now fewer than are kept reach the cut
    assert batch.encode(library, 1.0).why is None


def test_latents_without_codes_come_first_and_are_decided(library: Any) -> None:
    batch = draw(20, 700)
    batch.upper[:, [3, 400]] = NAN
    batch.pre[:, 3] = NAN
    batch.pre[4, 10], batch.upper[4, 10] = INF, INF
    batch.pre[5, 11], batch.upper[5, 11] = -INF, -INF
    for k in (0.5, 1.0, 1.05, 8.0):
        for factor in (0.0, 1.0):
            cut = cut_of(batch, k)
            guess = 0.9 * cut * factor if np.isfinite(cut) else 1.0 * factor
            found = batch.encode(library, k, guess)
            assert found.why is None, k
            assert_exact(batch, found, k)


def test_of_more_of_them_than_are_kept_only_nan_is_sure(library: Any) -> None:
    """20 entries are asked for, of the 400 NaN bounds the first 72 are kept."""
    batch = draw(20, 700)
    batch.upper[:, :20] = NAN
    batch.pre[1:4, :20] = NAN
    for guess in (0.0, 1.0):
        found = batch.encode(library, 1.0, guess)
        assert found.why is None and found.decided == 72
        assert_exact(batch, found, 1.0)
        batch.pre[1:3, :20] = 0.5
        found = batch.encode(library, 1.0, guess)
        assert found.why == "int8 codes leave the selection undecided"
        assert_exact(batch, found, 1.0)
        batch.pre[1:3, :20] = NAN


@pytest.mark.parametrize("screened", [False, True])
def test_a_block_of_rows_that_overflows_leaves_a_guess_unproved(
    library: Any, screened: bool
) -> None:
    """The other block alone has as many entries above it as were asked for."""
    batch = draw(70, 600)
    batch.pre[:64] += 3
    batch.upper[:64] += 3
    assert (batch.pre[64:] > 0.5).sum() > 70
    assert_exact(batch, batch.encode(library, 1.0, 0.5, screened), 1.0)


@pytest.mark.parametrize("guess", [0.0, 1.5])
def test_a_token_without_codes_is_the_plain_encoder_s(library: Any, guess: float) -> None:
    batch = draw(70, 600)
    batch.coded[66] = False
    batch.upper[66] = -INF
    batch.pre[66, 5] = NAN
    found = batch.encode(library, 3.0, guess)
    assert found.why == "a token has no int8 codes" and found.decided == 0
    assert_exact(batch, found, 3.0)


def test_fewer_positive_entries_than_asked(library: Any) -> None:
    batch = draw(20, 500)
    batch.pre -= 3
    batch.upper -= 3
    assert 5 < (batch.pre > 0).sum() < (batch.upper > 0).sum() < 240
    for guess in (0.0, 0.2, 1e30):
        found = batch.encode(library, 12.0, guess)
        assert found.why is None and found.result[5] == 0
        assert_exact(batch, found, 12.0)
    batch.pre[:], batch.upper[:] = -1, -0.5
    found = batch.encode(library, 12.0)
    assert found.why is None and found.result[4] == found.decided == 0


def test_all_entries_and_more(library: Any) -> None:
    batch = draw(18, 300)
    for k in (299.0, 300.0, 400.0):
        found = batch.encode(library, k)
        assert found.why is None
        assert_exact(batch, found, k)


def test_ties_go_to_row_then_latent(library: Any) -> None:
    batch = draw(20, 600)
    batch.pre[:] = np.floor(batch.pre)
    batch.upper[:] = batch.pre + 0.4
    ties = int((batch.pre == cut_of(batch, 20.0)).sum())
    found = batch.encode(library, 20.0)
    assert ties > 1000 and found.why == "int8 codes leave the selection undecided"
    assert_exact(batch, found, 20.0)
    batch.pre[:, 5:], batch.upper[:, 5:] = -1, -1
    for k in (1.3, 4.0):
        found = batch.encode(library, k)
        assert found.why is None
        assert_exact(batch, found, k)


def test_later_latents_that_beat_earlier_ones_overflow_and_are_found(library: Any) -> None:
    batch = draw(20, 1500)
    rise = 0.01 * np.arange(1500, dtype=np.float32)
    batch.pre += rise
    batch.upper += rise
    for guess in (0.0, 0.1, 0.9 * cut_of(batch, 3.0)):
        found = batch.encode(library, 3.0, guess)
        assert found.why is None
        assert_exact(batch, found, 3.0)
        assert found.waits == {0.0: 3, 0.1: 4}.get(guess, 2)


@pytest.mark.parametrize(
    ("n", "d_sae", "reason"),
    [(16, 4000, "there are few tokens"), (17, 1500, "d_sae is small for this k"), (17, 1600, None)],
)
def test_when_it_is_not_worth_it(library: Any, n: int, d_sae: int, reason: str | None) -> None:
    batch = draw(n, d_sae)
    batch.always = False
    found = batch.encode(library, 1.0)
    assert found.why == reason
    assert_exact(batch, found, 1.0)


def test_codes_of_something_else_are_an_error(library: Any) -> None:
    with pytest.raises(RuntimeError, match="no codes"):
        draw(20, 300).encode(library, 3.0, wrong=True)
