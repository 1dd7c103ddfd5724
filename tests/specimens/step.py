"""The optimizer's ops: fused and alone, every kind of state, rows that fit and rows in slabs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gemmascope_fast.kernels.adam_matrix import AdamMatrix, adam_matrix
from gemmascope_fast.kernels.adam_step import step_rows
from gemmascope_fast.kernels.fused_sparse_step import in_registers
from specimens.backward import BF16, FP32, I64, _new, _order

U8 = torch.uint8


def _matrix(
    F: int, d: int, dtype: torch.dtype, codes: bool = False, beta1: float = 0.0, flags: int = 0
) -> AdamMatrix:
    """A matrix under Adam in mid-run; `flags`: remove_parallel and unit_norm."""
    state = [
        _new(F, d) if beta1 else _new(0),
        _new(F, d, dtype=U8 if codes else FP32),
        _new(F, -(-d // 128), dtype=U8) if codes else _new(0, dtype=U8),
        _new(F, dtype=I64),
    ]
    rates, rule = [1e-3, beta1, 0.999, 1e-8], [1001, 88, flags, flags, 2**62 + 1]
    return adam_matrix("step", "weight", _new(F, d, dtype=dtype), state, rates, rule)


def _fused(
    dtype: torch.dtype,
    x_dtype: torch.dtype | None = None,
    codes: bool = False,
    beta1: float = 0.0,
    d: int = 5376,
    F: int = 65536,
    n: int = 8192,
) -> Callable[[], object]:
    def run() -> None:
        encoder, decoder = (_matrix(F, d, dtype, codes, beta1, flags) for flags in (0, 1))
        x, g = (_new(n, d, dtype=x_dtype or dtype) for _ in range(2))
        in_registers(_order(n, F), x, _groups(F, g), encoder, decoder)

    return run


def _groups(F: int, g: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    yield 0, F, g


def _alone(
    dtype: torch.dtype,
    codes: bool = False,
    beta1: float = 0.0,
    flags: int = 1,
    d: int = 5376,
    F: int = 65536,
) -> Callable[[], object]:
    return lambda: step_rows(_matrix(F, d, dtype, codes, beta1, flags), _new(F, d))


SPECIMENS: dict[str, Callable[[], object]] = {
    "step fused float32": _fused(FP32),
    "step fused float32 of bfloat16 x": _fused(FP32, BF16),
    "step fused bfloat16 8-bit": _fused(BF16, codes=True),
    "step fused bfloat16 8-bit momentum d=640": _fused(BF16, codes=True, beta1=0.9, d=640),
    "step adam float32": _alone(FP32),
    "step adam float32 momentum": _alone(FP32, beta1=0.9, flags=0),
    "step adam bfloat16 8-bit": _alone(BF16, codes=True),
    "step adam bias 1M": _alone(FP32, flags=0, d=1_048_576, F=1),
    "step adam bfloat16 8-bit d=87,040": _alone(BF16, codes=True, d=87_040, F=16_384),
}
