"""The GPU check's yardstick, a library product and a compaction: its entries; that it compiles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from gpu import checks, chunked, targets  # noqa: E402
from gpu.context import Shape  # noqa: E402
from gpu.problem import Problem, problem  # noqa: E402

from gemmascope_fast.kernels.launching import INTERPRETED  # noqa: E402

CPU = torch.device("cpu")
compiling_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="kernels run on a GPU or in Triton's interpreter: TRITON_INTERPRET=1"
)


@interpreted
@pytest.mark.triton
@pytest.mark.parametrize("chunk", (1024, 384, 5000))
def test_the_entries_are_those_of_a_dense_jumprelu(chunk: int) -> None:
    p = problem(Shape(6, 32, 2500, 40), CPU, decoder=False)
    pre = p.x.float() @ p.W_enc.float() + p.b_enc
    rows, latents = (pre > p.threshold).nonzero(as_tuple=True)
    offsets, indices, values = chunked.Chunked(p, chunk, rows.shape[0])()
    assert offsets.tolist() == [0, *torch.bincount(rows, minlength=6).cumsum(0).tolist()]
    assert indices.tolist() == latents.tolist()
    torch.testing.assert_close(values, pre[rows, latents], atol=1e-5, rtol=1e-5)
    assert checks.encoded(p, offsets, indices, values) < 1e-5


@interpreted
@pytest.mark.triton
def test_a_row_without_entries_and_one_with_all() -> None:
    W_enc = torch.ones(4, 96).bfloat16()
    x = torch.tensor([[-1.0] * 4, [1.0] * 4]).bfloat16()
    p = Problem(x, W_enc, torch.zeros(96), torch.ones(96), torch.empty(0), torch.empty(0))
    offsets, indices, values = chunked.Chunked(p, 64, 96)()
    assert offsets.tolist() == [0, 0, 96]
    assert indices.tolist() == [*range(96)] and values.unique().tolist() == [4.0]


@compiling_only
def test_a_cpu_without_the_interpreter_has_no_yardstick_and_says_why() -> None:
    p = problem(Shape(2, 16, 64, 2), CPU, decoder=False)
    found = chunked.contenders(p, 4)
    assert set(found.values()) == {"kernels of a GPU"}
    assert chunked.fastest({}) is None


def test_the_faster_of_the_two_is_the_target() -> None:
    small, large = (chunked.name(c) for c in chunked.CHUNKS)
    about = Shape(8192, 5376, 65536, 64).json()
    row: dict[str, Any] = {
        **{"shape": about, "ratios": {small: 1.4, large: 0.9}, "of_floor": None},
        **{"times": {"gemmascope_fast": {}}, "dense_matrix_bytes": 1},
    }
    (verdict,) = [v for v in targets.verdicts("encode", row) if "compaction" in v["text"]]
    assert verdict["found"] == 0.9 and not verdict["met"]


@compiling_only
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_the_kernels_compile_without_spills(target: str) -> None:
    from compiling import compile_launches

    meta = torch.device("meta")
    p = Problem(
        *(torch.empty(s, dtype=torch.bfloat16, device=meta) for s in ((8192, 64), (64, 4096))),
        *(torch.empty(4096, device=meta), torch.empty(4096, device=meta)),
        *(torch.empty(0, device=meta), torch.empty(0, device=meta)),
    )
    reports = compile_launches(target, chunked.Chunked(p, 1024, 8192 * 64))
    assert {r.kernel for r in reports} == {"_append_kernel", "_pack_rows_kernel"}
    assert all(r.spills == 0 for r in reports)
