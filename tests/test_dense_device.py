"""On a GPU the compiled ops hand over to dense products: `GEMMASCOPE_FAST_TEST_DEVICE=cuda`."""

from __future__ import annotations

import os

import pytest
import torch
import torch.utils._pytree as pytree
from samples import HANDED_OVER, problem, samples
from torch import Tensor
from transport import on_device

from gemmascope_fast import ops, triton_launchers

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import dense

DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")
OFFERED = torch._C._dispatch_has_kernel(f"{ops.TRITON}::set_rates")
ALWAYS = [0.0, 1.0, 1.0, 1.0, 1e-12, 1e-12]
"""Rates of a device whose passes are slower than anything."""


@pytest.mark.skipif(not (DEVICE and OFFERED), reason="needs a GPU and the CUDA half")
@pytest.mark.parametrize("name", HANDED_OVER)
def test_the_op_is_handed_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    product = dense._product
    monkeypatch.setattr(dense, "FORCED", True)
    monkeypatch.setattr(dense, "_product", lambda *a: calls.append(1) or product(*a))
    args = [
        a.round() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in samples(problem(integer=True))[name][0]
    ]
    ours, theirs = (
        pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args) for _ in range(2)
    )
    op = getattr(torch.ops.gemmascope_fast, name).default
    torch.ops.gemmascope_fast_triton.set_rates(ALWAYS)
    try:
        results = on_device(op, torch.device(DEVICE))(*ours)
    finally:
        torch.ops.gemmascope_fast_triton.set_rates(triton_launchers.dense_rates())
    assert calls, "a pass served"
    wanted = ops.TABLE[name].reference(*theirs)
    for mine, other in zip(
        pytree.tree_leaves((results, ours)), pytree.tree_leaves((wanted, theirs)), strict=True
    ):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, other, equal_nan=True)
