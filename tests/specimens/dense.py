"""What surrounds the dense products: entries as a matrix, those left out, elements at entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemmascope_fast.kernels.dense_gather import dense_gather
from gemmascope_fast.kernels.dense_remainder import dense_remainder
from gemmascope_fast.kernels.densify import densify

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
L0 = 512


def _new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _entries(rows: int) -> tuple[Tensor, Tensor]:
    return _new(rows + 1, dtype=torch.int64), _new(8192 * L0, dtype=torch.int32)


def _densify(
    dtype: torch.dtype, parts: int, rows: int = 2048, width: int = 16384
) -> Callable[[], object]:
    def run() -> Tensor:
        offsets, indices = _entries(rows)
        finite = _new(width, dtype=torch.bool)
        dense = _new(parts, rows, width, dtype=dtype)
        return densify(offsets, indices, _new(8192 * L0), finite, dense, indices)

    return run


def _remainder(dtype: torch.dtype, d: int = 5376, F: int = 16384) -> Callable[[], object]:
    def run() -> None:
        offsets, left = _entries(2048)
        any_left = _new(2048, dtype=torch.int32)
        matrix = _new(F, d, dtype=dtype)
        dense_remainder(offsets, left, _new(8192 * L0), matrix, any_left, _new(2048, d))

    return run


def _gather(rows: int, width: int) -> Callable[[], object]:
    return lambda: dense_gather(*_entries(rows), _new(rows, width), _new(8192 * L0))


SPECIMENS: dict[str, Callable[[], object]] = {
    "densify in two parts": _densify(BF16, 2),
    "densify in three parts": _densify(BF16, 3),
    "densify float32": _densify(FP32, 1),
    "densify odd width": _densify(BF16, 2, rows=3251, width=10079),
    "densify 1M": _densify(BF16, 2, rows=32, width=1048576),
    "dense remainder": _remainder(BF16),
    "dense remainder float16": _remainder(FP16),
    "dense remainder float32": _remainder(FP32),
    "dense remainder odd width": _remainder(BF16, d=639, F=10080),
    "dense gather": _gather(2048, 16384),
    "dense gather odd width": _gather(3329, 10079),
}
