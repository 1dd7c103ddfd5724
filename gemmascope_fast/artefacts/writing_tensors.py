"""Tensors in the safetensors format, written by blocks of rows.

The library's writer wants every tensor whole and row-major: a second copy of W_enc and, of a packed
decoder, one with its zeros. The tests compare the bytes with its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .gemma_scope_2 import DTYPES
from .validate import Spec, finite, rows_per_block

OP = "save_pretrained"
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor of a file: its parameter, what is declared of it, its rows `start:stop`."""

    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored(parameter: str, t: Tensor, dtype: torch.dtype | None = None) -> Stored:
    """The whole of `t`, as `dtype`."""

    def rows(start: int, stop: int) -> Tensor:
        block = t[start:stop]
        if block.dim() == 2 and block.stride(0) == 1:  # a transpose: 5x faster in two steps
            return block.t().contiguous().t()
        return block

    return Stored(parameter, tuple(t.shape), t.dtype if dtype is None else dtype, rows)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the biases and thresholds beside matrices of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The library's order: wide dtypes first, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    return {name: tensors[name] for name in order}


def specs(tensors: Mapping[str, Stored]) -> dict[str, Spec]:
    """What the file declares."""
    return {name: Spec(t.shape, t.dtype) for name, t in tensors.items()}


def header_of(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """The bytes before those of the tensors, which follow in their order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": CODES[t.dtype], "shape": t.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    file: IO[bytes], tensors: Mapping[str, Stored], metadata: Mapping[str, str]
) -> None:
    """Write one file.

    Raises:
        ValueError: a value is not finite, or beyond the range of its dtype.
    """
    tensors = in_order(tensors)
    file.write(header_of(tensors, metadata))
    for t in tensors.values():
        step = rows_per_block(t.shape, t.dtype.itemsize)
        for start in range(0, t.shape[0], step):
            rows = t.rows(start, min(start + step, t.shape[0])).cpu()
            block = finite(OP, t.parameter, rows, t.dtype).contiguous()
            file.write(block.view(-1).view(torch.uint8).numpy().data)
