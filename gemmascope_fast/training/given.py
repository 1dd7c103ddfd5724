"""What a run is given: a source that fits its kind, and the device that it runs on."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import present_device
from .rows import Array
from .settings import KINDS, LAYERED, MAPPING, OP
from .shards import ShardSource
from .sources import Source, TensorSource

Rows = Array | tuple[Array, Array] | str | os.PathLike[str] | Source


def as_source(source: Any, kind: str) -> Source:
    """`source` as a `Source`.

    Raises:
        TypeError: it is none of the kinds that `train` takes.
        ValueError: it has a target and the kind none, or layers, or the reverse.
    """
    if isinstance(source, (Tensor, np.ndarray)):
        made: Source = TensorSource(source)  # type: ignore[arg-type]
    elif isinstance(source, (tuple, list)) and len(source) == 2:
        made = TensorSource(*source)
    elif isinstance(source, (str, os.PathLike)):
        made = ShardSource(source)
    elif isinstance(source, Source):
        made = source
    else:
        raise TypeError(
            f"{OP}: source must be a tensor, a pair of tensors, a folder of shards or a Source, "
            f"got {type(source).__name__}"
        )
    if kind in KINDS and (made.d_out is not None, made.layers is not None) != _form(kind):
        have = "no target" if made.d_out is None else "a target"
        where = "one layer" if made.layers is None else f"{made.layers} layers"
        raise ValueError(
            f"{OP}: kind={kind!r} does not fit a source with {have}, of {where}: an SAE needs "
            "activations [N, d_in] alone, a transcoder pairs of [N, d_in] and [N, d_out], a "
            "crosscoder activations [N, L, d] of several layers alone (of a model: hook points in "
            "braces, or a list), a CLT pairs of such"
        )
    if made.layers is not None and (made.layers < 1 or made.d_in % made.layers):
        raise ValueError(f"{OP}: a source of {made.layers} layers has rows of d_in={made.d_in}")
    if made.layers is not None and made.d_out not in (None, made.d_in):
        raise ValueError(
            f"{OP}: the target of several layers must be as wide as x, {made.d_in}, got "
            f"{made.d_out}"
        )
    return made


def _form(kind: str) -> tuple[bool, bool]:
    """Whether sources of this kind have a target, and layers."""
    return kind in MAPPING, kind in LAYERED


def sizes_of(source: Source) -> dict[str, Any]:
    """What a source decides of the `Settings`: widths, of each layer, and the number of layers."""
    width = source.d_in if source.d_out is None else source.d_out
    layers = source.layers or 1
    return {"d_in": source.d_in // layers, "d_out": width // layers, "layers": source.layers}


def place_of(source: Any, device: torch.device | str | None) -> torch.device:
    """Where a run is: on `device`, or where its source is.

    Raises:
        ValueError: `device` names none that is here and has memory.
    """
    if device is not None:
        found = present_device(OP, device)
        if found.type == "meta":
            raise ValueError(f"{OP}: device must have memory, got meta")
        return found
    first = source[0] if isinstance(source, (tuple, list)) else source
    if isinstance(first, Tensor):
        return first.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
