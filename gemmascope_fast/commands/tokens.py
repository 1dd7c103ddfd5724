"""Activations in a safetensors file, read a block of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


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
        with _opened(path) as file:
            names = sorted(file.keys())
            if name not in names:
                raise ValueError(f"{path} must hold {name}, and holds {', '.join(names)[:200]}")
            entry = file.get_slice(name)
            shape, code = tuple(entry.get_shape()), entry.get_dtype()
        if code not in FLOATS:
            raise ValueError(f"{path}: {name} must be floating point, 16 bits or more, got {code}")
        self.dtype = FLOATS[code]
        self.batch = shape[: len(shape) - len(width)]
        if len(shape) < len(width) or shape[len(self.batch) :] != width:
            expected = ", ".join(map(str, width))
            raise ValueError(f"{path}: {name} must be [*batch, {expected}], got {list(shape)}")
        self.n = math.prod(self.batch)

    def rows(self, start: int, stop: int) -> Tensor:
        """`[stop - start, *width]`: some tokens.

        The file is opened each time: pages of a mapping count as resident while it is open.
        """
        with _opened(self.path) as file:
            whole: Tensor = file.get_tensor(self.name)
            return whole.view(-1, *self.width)[start:stop].clone()

    def blocks(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """The tokens from `start` on, `size` at a time."""
        for begin in range(start, self.n, size):
            yield self.rows(begin, min(begin + size, self.n))


def has(path: Path, name: str) -> bool:
    """Whether a file holds a tensor of this name."""
    with _opened(path) as file:
        return name in file.keys()  # noqa: SIM118 (not a dict)


def width_of(module: Any) -> tuple[int, ...]:
    """The shape of a module's token: `(d_in,)`, or `(L, d_model)` for several layers."""
    layers = getattr(module, "n_layers", None)
    return (module.d_in,) if layers is None else (layers, module.d_model)


def _opened(path: Path) -> Any:
    """Open a file through its library.

    Raises:
        ValueError: it is no complete safetensors file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
