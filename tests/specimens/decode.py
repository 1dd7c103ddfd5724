"""Passes in token order: the sort by latent, decode, dot products of entries, pre_at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemmascope_fast.kernels.by_feature import by_feature
from gemmascope_fast.kernels.decode import decode, decode_
from gemmascope_fast.kernels.gathered_dot import gathered_dot
from gemmascope_fast.kernels.pre_at import pre_at

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
L0 = 64


def _new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _entries(n: int) -> tuple[Tensor, Tensor]:
    return _new(n + 1, dtype=torch.int64), _new(n * L0, dtype=torch.int32)


def _decode(
    dtype: torch.dtype, n: int = 8192, F: int = 65536, d: int = 5376, row_major: bool = True
) -> Callable[[], object]:
    def run() -> Tensor:
        W_dec = _new(F, d, dtype=dtype) if row_major else _new(d, F, dtype=dtype).t()
        return decode(*_entries(n), _new(n * L0), W_dec, _new(d), None, None, dtype)

    return run


def _decode_in_place() -> None:
    recon = _new(5376, 8192, dtype=BF16).t()
    W_dec = _new(65536, 5376, dtype=BF16)
    decode_(recon, *_entries(8192), _new(8192 * L0), W_dec)


def _dots(
    dtype: torch.dtype, g_dtype: torch.dtype, n: int = 8192, F: int = 65536, d: int = 5376
) -> Callable[[], object]:
    return lambda: gathered_dot(*_entries(n), _new(F, d, dtype=dtype), _new(n, d, dtype=g_dtype))


def _pre_at(pairs: int, dtype: torch.dtype, d: int = 5376, F: int = 65536) -> Callable[[], object]:
    def run() -> Tensor:
        rows = _new(pairs, dtype=torch.int64)
        return pre_at(_new(8192, d, dtype=dtype), _new(F, d, dtype=dtype).t(), _new(F), rows, rows)

    return run


SPECIMENS: dict[str, Callable[[], object]] = {
    "by_feature 16k": lambda: by_feature(*_entries(8192), 16384),
    "by_feature 1M": lambda: by_feature(*_entries(8192), 1048576),
    "by_feature of 33M entries": lambda: by_feature(*_entries(2**19), 65536),
    "by_feature of 2^31 entries": lambda: by_feature(*_entries(2**25), 65536),
    "decode": _decode(BF16),
    "decode float16": _decode(FP16),
    "decode float32": _decode(FP32),
    "decode one token": _decode(BF16, n=1),
    "decode odd width": _decode(BF16, d=639, F=10080),
    "decode columns apart": _decode(BF16, n=1, row_major=False),
    "decode in place": _decode_in_place,
    "gathered dot": _dots(BF16, BF16),
    "gathered dot float32": _dots(FP32, FP32),
    "gathered dot mixed": _dots(FP16, FP32),
    "gathered dot one token": _dots(BF16, BF16, n=1),
    "gathered dot small": _dots(BF16, FP32, n=64, d=640, F=10080),
    "pre_at": _pre_at(2**19, BF16),
    "pre_at float32": _pre_at(64, FP32),
    "pre_at odd width": _pre_at(4096, FP16, d=639, F=10080),
}
