"""Sparse activations in a safetensors file.

    offsets [n + 1] int64   indices [nnz] int32   values [nnz] float32   shape [ndim] int64

are a `SparseActs` of active entries; of several layers, each name has `layer_{i}.` before it. The
header's metadata say what made them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..sparse import SparseActs
from . import files

OP = "load_acts"
KEYS = ("offsets", "indices", "values", "shape")
_DTYPES = {
    "offsets": (torch.int64,),
    "indices": (torch.int32,),
    "values": (torch.float32, torch.float64),
    "shape": (torch.int64,),
}
_CODES = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64"}


def prefix(layer: int | None) -> str:
    """What stands before the names of a layer's tensors; None is a single-layer artefact."""
    return "" if layer is None else f"layer_{layer}."


def header(
    tensors: Mapping[str, tuple[torch.dtype, list[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file, whose tensors follow in the order given."""
    described: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        described[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def metadata(path: Path) -> dict[str, str]:
    """What the header of a file says beside its tensors; nothing where it is no such file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def load_acts(path: str | os.PathLike[str]) -> SparseActs | list[SparseActs]:
    """Load what `python -m gemmascope_fast encode` wrote.

    Args:
        path: the file.

    Returns:
        A `SparseActs` of shape `[*batch, d_sae]`, every entry active; of a crosscoder or a
        cross-layer transcoder a list of them, one for each layer.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `path` is no path.
        ValueError: the file is damaged, or its entries are not in order or out of range.
    """
    target = files.as_path(OP, "path", path)
    if not target.exists():
        raise FileNotFoundError(f"{OP}: {target} does not exist")
    try:
        with safe_open(str(target), framework="pt") as file:
            names = set(file.keys())
            layers = _layers(target, names)
            found = [
                {key: file.get_tensor(prefix(layer) + key) for key in KEYS} for layer in layers
            ]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{OP}: {target} must be a complete safetensors file: {error}") from error
    acts = [
        _entries(f"{OP}: {target}", tensors, prefix(layer))
        for layer, tensors in zip(layers, found, strict=True)
    ]
    return acts[0] if layers == [None] else acts


def _layers(path: Path, names: set[str]) -> list[int | None]:
    """The layers that a file holds, [None] where there is but one.

    Raises:
        ValueError: the names are others.
    """
    several = [re.fullmatch(r"layer_(\d{1,4})\.offsets", name) for name in names]
    count = sum(match is not None for match in several)
    layers: list[int | None] = list(range(count)) if count else [None]
    expected = {prefix(layer) + key for layer in layers for key in KEYS}
    if names != expected:
        odd = sorted(names ^ expected)[0]
        raise ValueError(
            f"{OP}: {path} must hold {', '.join(KEYS)}, of several layers each with layer_0., "
            f"layer_1., ... before it; {odd!r:.80} is {'unknown' if odd in names else 'missing'}"
        )
    return layers


def _entries(where: str, tensors: dict[str, Tensor], before: str) -> SparseActs:
    """The activations that four tensors describe.

    Raises:
        ValueError: they do not fit together.
    """

    def require(valid: bool, key: str, expected: str) -> None:
        if not valid:
            raise ValueError(f"{where}: {before}{key} must {expected}")

    for key, t in tensors.items():
        kinds = " or ".join(str(d).removeprefix("torch.") for d in _DTYPES[key])
        fits = t.dim() == 1 and t.dtype in _DTYPES[key]
        require(fits, key, f"be a {kinds} vector, got {t.dtype} of shape {list(t.shape)}")
    offsets, indices, values, shape = (tensors[key] for key in KEYS)
    sizes = shape.tolist()
    require(len(sizes) >= 1 and min(sizes) >= 0 and sizes[-1] < 2**31, "shape", "hold sizes >= 0")
    n = 1
    for size in sizes[:-1]:
        n *= size
    require(len(offsets) == n + 1, "offsets", f"have n + 1 = {n + 1} elements, got {len(offsets)}")
    require(len(values) == len(indices), "values", f"have {len(indices)} elements, as indices")
    ascending = int(offsets[0]) == 0 and int(offsets[-1]) == len(indices)
    ascending = ascending and bool((offsets[1:] >= offsets[:-1]).all())
    require(ascending, "offsets", f"ascend from 0 to the {len(indices)} entries")
    if len(indices):
        low, high = (int(v) for v in torch.aminmax(indices))
        require(low >= 0 and high < sizes[-1], "indices", f"be in [0, d_sae={sizes[-1]})")
        first = torch.zeros(len(indices) + 1, dtype=torch.bool)
        first[offsets] = True  # where a token begins, the latent may be smaller than before
        falls = (indices[1:] <= indices[:-1]) & ~first[1:-1]
        require(not bool(falls.any()), "indices", "ascend inside each token")
    return SparseActs(offsets, indices, values, torch.ones_like(values), tuple(sizes))
