"""Activations in a safetensors file, read a block of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefacts import files
from ..artefacts.gemma_scope_2 import SafetensorsFile

OP = "activations"


class TokenFile:
    """A tensor `[*batch, *width]` of a file, as tokens of the shape `width`.

    Args:
        path: the file.
        name: of the tensor.
        width: `(d,)`, or `(L, d)` for several layers.

    Attributes:
        batch: the leading sizes.

    Raises:
        ValueError: the file is damaged, or the tensor missing, not floating point or of another
            width.
    """

    def __init__(self, path: Path, name: str, width: tuple[int, ...]) -> None:
        self.path, self.name, self.width = path, name, width
        self._file = _opened(path)
        if name not in self._file.specs:
            names = ", ".join(sorted(self._file.specs))
            raise ValueError(f"{path} must hold {name}, and holds {names:.200}")
        shape, dtype = self._file.specs[name]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{path}: {name} must be floating point, 16 bits or more, got {dtype}")
        self.dtype = dtype
        self.batch = shape[: len(shape) - len(width)]
        if len(shape) < len(width) or shape[len(self.batch) :] != width:
            expected = ", ".join(map(str, width))
            raise ValueError(f"{path}: {name} must be [*batch, {expected}], got {list(shape)}")
        self.n = math.prod(self.batch)

    def rows(self, start: int, stop: int) -> Tensor:
        """`[stop - start, *width]`: some tokens.

        Raises:
            ValueError: the file was written to since it was opened; being replaced does no harm.
        """
        size = math.prod(self.width)
        block = self._file.run(self.name, start * size, stop * size)
        self._file.finish()
        return block.view(stop - start, *self.width)

    def blocks(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """The tokens from `start` on, `size` at a time."""
        for begin in range(start, self.n, size):
            yield self.rows(begin, min(begin + size, self.n))


def has(path: Path, name: str) -> bool:
    """Whether a file holds a tensor of this name."""
    with _opened(path) as file:
        return name in file.specs


def width_of(module: Any) -> tuple[int, ...]:
    """The shape of a module's token: `(d_in,)`, or `(L, d_model)` for several layers."""
    layers = getattr(module, "n_layers", None)
    return (module.d_in,) if layers is None else (layers, module.d_model)


def _opened(path: Path) -> SafetensorsFile:
    """Open a regular file, read by `pread`: a mapping needs memory for all of it.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no complete safetensors file.
    """
    return SafetensorsFile(files.existing(path, OP), OP)
