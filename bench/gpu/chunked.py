"""The fused encoder's yardstick: the library's product in chunks of latents, and a compaction.

    for each chunk:  pre = x @ W_enc[:, chunk]  (float32);  append where pre + b_enc > threshold

A chunk that stays in the L2 cache costs no memory traffic, but its product is small. The product is
the library's own; the compaction reads each element once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import triton_launchers

from . import checks
from .problem import Problem

CHUNKS = (1024, 16384)
"""Latents per product: at n = 8192 one that the L2 cache of an H100 holds, and an efficient one."""


def name(chunk: int) -> str:
    """The contender with this chunk."""
    return f"library product, {chunk:,} latents at a time"


def contenders(p: Problem, nnz: int) -> dict[str, Callable[[], object] | str]:
    """One per chunk, its entries checked, or why there is none.

    Args:
        p: its `x` and `W_enc` of one 16-bit dtype.
        nnz: entries of the result.
    """
    if reason := _unavailable(p.x.device):
        return {name(chunk): reason for chunk in CHUNKS}
    calls = {c: Chunked(p, c, nnz) for c in CHUNKS if c <= p.threshold.shape[0]}
    for call in calls.values():
        checks.encoded(p, *call())
    return {name(c): calls[c] if c in calls else "more than all latents" for c in CHUNKS}


class Chunked:
    """One call encodes; the product's and the rows' buffers are made once, outside the timing."""

    def __init__(self, p: Problem, chunk: int, nnz: int) -> None:
        n, device = p.x.shape[0], p.x.device
        self.p, self.chunk, self.nnz = p, chunk, nnz
        self.pre = torch.empty(n * chunk, device=device)
        self.room = 64 + 4 * -(-nnz // max(n, 1))
        self.latents = torch.empty(n, self.room, dtype=torch.int32, device=device)
        self.values = torch.empty(n, self.room, device=device)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """offsets `[n + 1]` int64, indices `[nnz]` int32, values `[nnz]` float32."""
        from . import chunked_kernels as kernels

        p, n = self.p, self.p.x.shape[0]
        filled = torch.zeros(n, dtype=torch.int32, device=p.x.device)
        for first in range(0, p.threshold.shape[0], self.chunk):
            width = min(self.chunk, p.threshold.shape[0] - first)
            pre = _product(p.x, p.W_enc[:, first : first + width], self.pre[: n * width])
            kernels.append(pre, p.b_enc, p.threshold, first, filled, self.latents, self.values)
        offsets = torch.zeros(n + 1, dtype=torch.int64, device=p.x.device)
        torch.cumsum(filled, 0, out=offsets[1:])
        return offsets, *kernels.pack_rows(offsets, self.latents, self.values, self.nnz)


def _product(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    out = out.view(x.shape[0], W.shape[1])
    if x.device.type == "cuda":
        return torch.mm(x, W, out_dtype=torch.float32, out=out)
    return torch.mm(x.float(), W.float(), out=out)


def _unavailable(device: torch.device) -> str:
    if not triton_launchers.FOUND:
        return "triton is not installed"
    from gemmascope_fast.kernels.launching import INTERPRETED

    return "" if device.type == "cuda" or INTERPRETED else "kernels of a GPU"


def fastest(ratios: dict[str, Any]) -> float | None:
    """Our speed against the faster of the two; None where neither ran."""
    found = [ratios[name(chunk)] for chunk in CHUNKS if name(chunk) in ratios]
    return min(found) if found else None
