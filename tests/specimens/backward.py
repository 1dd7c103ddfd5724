"""The backward ops: every gradient wanted, fused and composed, short and long rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemmascope_fast.kernels.latent_backward import latent_backward
from gemmascope_fast.kernels.latent_order import (
    GRADIENT,
    VALUES,
    LatentOrder,
    latent_order,
)
from gemmascope_fast.kernels.latent_sums import latent_sums
from gemmascope_fast.kernels.token_order import token_order
from gemmascope_fast.kernels.weight_gradient import weight_gradient

BF16, FP16, FP32, I32, I64 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.int64,
)
L0 = 64


def _new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _order(n: int, F: int) -> LatentOrder:
    """What `latent_order` returns, not launched."""
    capacity = n * L0
    return LatentOrder(
        _new(F + 1, dtype=I64),
        _new(capacity, dtype=I64),
        _new(capacity, dtype=I32),
        _new(capacity, dtype=I32),
        _new(4, capacity),
        n,
    )


def _sorted(n: int = 8192, F: int = 65536) -> None:
    capacity = n * L0
    offsets, indices = _new(n + 1, dtype=I64), _new(capacity, dtype=I32)
    view = (_new(F + 1, dtype=I64), _new(capacity, dtype=I64))
    numbers = [_new(capacity) for _ in range(4)]
    latent_order(offsets, indices, *view, numbers)
    latent_order(offsets, indices, *view, numbers[:1])
    token_order(_order(n, F))


def _sums(F: int, n: int = 8192) -> Callable[[], object]:
    return lambda: latent_sums(_order(n, F), _new(F), 0.001)


def _weight(
    dtype: torch.dtype, coefficients: int = VALUES, n: int = 8192, F: int = 65536, d: int = 5376
) -> Callable[[], object]:
    def run() -> None:
        matrix, gradient = _new(n, d, dtype=dtype), _new(F, d, dtype=dtype)
        weight_gradient(_order(n, F), coefficients, coefficients != VALUES, matrix, gradient)

    return run


def _fused(
    dtype: torch.dtype,
    g_dtype: torch.dtype | None = None,
    n: int = 8192,
    F: int = 65536,
    d: int = 5376,
    sets: int = 1,
) -> Callable[[], object]:
    def run() -> None:
        weights = [_new(F, d, dtype=dtype) for _ in range(3)]
        g = _new(sets * n, d, dtype=g_dtype or dtype)
        W_dec, *gradients = weights
        latent_backward(_order(sets * n, F), W_dec, g, _new(n, d, dtype=dtype), *gradients)

    return run


SPECIMENS: dict[str, Callable[[], object]] = {
    "backward latent order": _sorted,
    "backward sums 16k": _sums(16_384),
    "backward sums 65k": _sums(65_536),
    "backward sums 1M": _sums(1_048_576),
    "backward weight bfloat16": _weight(BF16),
    "backward weight bfloat16 gated 1M": _weight(BF16, GRADIENT, F=1_048_576),
    "backward weight float32": _weight(FP32),
    "backward weight float16 stacked rows": _weight(FP16, GRADIENT, d=87_040, F=16_384),
    "backward weight bfloat16 d=640": _weight(BF16, d=640, F=10_080),
    "backward fused bfloat16": _fused(BF16),
    "backward fused bfloat16 1M": _fused(BF16, F=1_048_576),
    "backward fused float16": _fused(FP16, F=16_384),
    "backward fused float32": _fused(FP32),
    "backward fused bfloat16 groups and sets": _fused(BF16, FP32, sets=2),
    "backward fused bfloat16 d=640": _fused(BF16, d=640, F=10_080),
    "backward fused bfloat16 d=2304": _fused(BF16, d=2304),
    "backward fused float32 d=8192": _fused(FP32, d=8192, F=16_384),
}
