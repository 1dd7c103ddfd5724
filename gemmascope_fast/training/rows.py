"""Rows of activations: the shapes that they may have, and those which a mask keeps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_float

Array = Tensor | np.ndarray[Any, Any]


def from_numpy(value: Any) -> Any:
    """An array of numpy as a tensor of the same memory, which is only read; others as they are."""
    if not isinstance(value, np.ndarray):
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that is read-only, of np.load(mmap_mode="r"), say
        return torch.from_numpy(value)


def kept_rows(mask: Tensor, rows: int) -> Tensor:
    """`[r]` int64 on the CPU: rows where `mask [rows]` is not 0.

    Raises:
        TypeError: the mask is not of bool or integers.
        ValueError: its shape is wrong.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        raise TypeError("train: mask must be a tensor of bool or integers")
    if tuple(mask.shape) != (rows,):
        raise ValueError(f"train: mask must have shape [{rows}], got {tuple(mask.shape)}")
    return mask.cpu().nonzero()[:, 0]


def row_shape(width: int, layers: int | None) -> list[int]:
    """Shape of a row of `width` numbers: `[width]`, or `[L, d]` of several layers."""
    return [width] if layers is None else [layers, width // layers]


def check_layers(op: str, name: str, target: Tensor, x: Tensor) -> None:
    """A target has x's layers and width where one of them has several layers.

    Raises:
        ValueError: it has not.
    """
    if target.shape[1:] != x.shape[1:] and 3 in (x.dim(), target.dim()):
        raise ValueError(
            f"{op}: {name} must have the layers and width of x, {tuple(x.shape[1:])}, got "
            f"{tuple(target.shape[1:])}"
        )


def check_rows(name: str, t: Any) -> None:
    """`t` is `[N, d]` or `[N, L, d]` floating-point values.

    Raises:
        TypeError: it is not floating point.
        ValueError: its shape is another, or it is on the meta device.
    """
    check_float("train", name, t)
    if t.is_meta:
        raise ValueError(f"train: {name} must have values, and is on the meta device")
    if t.dim() not in (2, 3) or 0 in t.shape:
        raise ValueError(
            f"train: {name} must have shape [N >= 1, d >= 1], or [N, L, d] of several layers, got "
            f"{tuple(t.shape)}"
        )
