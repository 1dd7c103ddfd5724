"""Launches of the selection kernels behind topk_encode and batchtopk_encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.kernels.select_count import select_count
from gemmascope_fast.kernels.select_cut import select_cut
from gemmascope_fast.kernels.select_fill import select_fill
from gemmascope_fast.kernels.select_histogram import BINS, LEVELS, select_histogram
from gemmascope_fast.kernels.select_place import select_place
from gemmascope_fast.kernels.select_rows import select_rows


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _csr(n: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty(torch.int64, n + 1),
        _empty(torch.int32, capacity),
        _empty(torch.float32, capacity),
    )


def rows(n: int, k: int) -> None:
    """One merge of topk_encode and its last step."""
    kept = _empty(torch.int32, n, k), _empty(torch.float32, n, k), _empty(torch.int32, n)
    select_rows(*kept, *_csr(n, n * (4 * k + 64)))
    select_fill(*kept)


def batch(n: int, k: int) -> None:
    """One merge of batchtopk_encode."""
    kept, found = _csr(n, n * k), _csr(n, n * (4 * k + 64))
    values = kept[0], kept[2], found[0], found[2]
    histograms = _empty(torch.int64, LEVELS, BINS.value)
    for level in range(LEVELS):
        select_histogram(*values, histograms, n * k, level)
    cut = select_cut(histograms, n * k)
    before = select_count(*values, cut, k)
    select_place(kept, found, cut, before, k)


SPECIMENS: dict[str, Callable[[], Any]] = {
    "select rows, n=8192, k=64": lambda: rows(8192, 64),
    "select rows, n=8192, k=512": lambda: rows(8192, 512),
    "select rows, n=33, k=77": lambda: rows(33, 77),
    "select batch, n=8192, k=64": lambda: batch(8192, 64),
    "select batch, n=33, k=77": lambda: batch(33, 77),
}
