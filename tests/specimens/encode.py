"""The fused encoder: every dtype, both layouts of W_enc, large and small batches, an odd shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemmascope_fast.kernels.encode_tiles import Tiles, encode_missing, encode_tiles
from gemmascope_fast.kernels.insert_invalid import insert_invalid
from gemmascope_fast.kernels.place_entries import place_entries
from gemmascope_fast.kernels.scan_rows import scan_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAPACITY = 2**21


def _new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _encoder(
    n: int, d: int, F: int, x_dtype: torch.dtype, w_dtype: torch.dtype, row_major: bool
) -> tuple[Tensor, Tensor, Tensor]:
    W_enc = _new(d, F, dtype=w_dtype) if row_major else _new(F, d, dtype=w_dtype).t()
    return _new(n, d, dtype=x_dtype), W_enc, _new(F)


def _encode(
    n: int = 8192,
    d: int = 5376,
    F: int = 65536,
    dtype: torch.dtype = BF16,
    w_dtype: torch.dtype | None = None,
    bandwidth: float = 0.0,
    row_major: bool = False,
) -> Callable[[], Tiles]:
    def run() -> Tiles:
        encoder = _encoder(n, d, F, dtype, w_dtype or dtype, row_major)
        return encode_tiles(*encoder, CAPACITY, threshold=_new(F), bandwidth=bandwidth)

    return run


def _missing() -> Tiles:
    encoder = _encoder(8192, 5376, 65536, BF16, BF16, False)
    tiles = encode_tiles(*encoder, CAPACITY, threshold=_new(65536))
    return encode_missing(tiles, 2 * CAPACITY, *encoder, _new(65536), 0.0)


def _bounded(F: int, stride: int) -> Callable[[], Tiles]:
    def run() -> Tiles:
        encoder = _encoder(8192, 5376, F, BF16, BF16, False)
        return encode_tiles(*encoder, CAPACITY, bound=_new(8192).as_strided((8192,), (stride,)))

    return run


def _rest(n: int, F: int, d: int = 5376, capacity: int = CAPACITY) -> Callable[[], None]:
    def run() -> None:
        tiles = encode_tiles(*_encoder(n, d, F, BF16, BF16, False), capacity, threshold=_new(F))
        assert tiles.first_invalid is not None
        offsets = scan_rows(tiles.counts, tiles.first_invalid)
        indices, needed = _new(capacity, dtype=torch.int32), offsets[-1]
        values, gate = _new(capacity), _new(capacity)
        place_entries(tiles, offsets, needed, indices, values, gate)
        place_entries(tiles._replace(first_invalid=None), offsets, needed, indices, values)
        insert_invalid(tiles.first_invalid, offsets, needed, indices, values, gate)

    return run


SPECIMENS: dict[str, Callable[[], object]] = {
    "bf16": _encode(),
    "bf16, 16k": _encode(F=16384),
    "bf16, 1M": _encode(F=1048576),
    "bf16, window": _encode(bandwidth=0.001),
    "bf16, row-major": _encode(row_major=True),
    "bf16, d 640, F 10080": _encode(d=640, F=10080),
    "bf16, odd": _encode(n=1000, d=637, F=10081),
    "bf16, n 1": _encode(n=1),
    "bf16, n 16": _encode(n=16),
    "bf16, n 64": _encode(n=64),
    "fp16": _encode(dtype=FP16),
    "fp32": _encode(dtype=FP32),
    "fp32, n 1": _encode(n=1, dtype=FP32),
    "fp32 x, bf16 W": _encode(w_dtype=BF16, dtype=FP32),
    "bf16 x, fp16 W": _encode(w_dtype=FP16),
    "again": _missing,
    "bound": _bounded(65536, 1),
    "bound, 1k": _bounded(1024, 0),
    "placing": _rest(8192, 65536),
    "placing, n 1": _rest(1, 1048576),
    "every size 1": _rest(1, 1, 1, 1),
}
