"""Sparse activations in a safetensors file.

    offsets [n + 1] int64   indices [nnz] int32   values [nnz] float32   shape [ndim] int64

are a `SparseActs` of active entries; of several layers, each name has `layer_{i}.` before it. The
header's metadata say what made them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..arguments import as_path
from ..sparse import SparseActs
from . import files
from .gemma_scope_2 import SafetensorsFile
from .validate import Spec

OP = "load_acts"
KEYS = ("offsets", "indices", "values", "shape")
DIMS = 64  # of a shape; torch's ops have no more
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
        with SafetensorsFile(files.existing(path, OP), OP) as file:
            return file.metadata
    except (OSError, ValueError):
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
    target = files.existing(as_path(OP, "path", path), OP)
    with SafetensorsFile(target, OP, {code: dtype for dtype, code in _CODES.items()}) as file:
        layers = _layers(target, set(file.specs))
        for layer in layers:
            _check(f"{OP}: {target}", file.specs, prefix(layer))
        acts = [_entries(file, prefix(layer)) for layer in layers]
        file.finish()
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


def _check(where: str, specs: Mapping[str, Spec], before: str) -> None:
    """The four tensors of a layer are vectors of their dtypes.

    Raises:
        ValueError: one is not, or shape has too many sizes.
    """
    for key, dtypes in _DTYPES.items():
        shape, dtype = specs[before + key]
        if len(shape) != 1 or dtype not in dtypes:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(
                f"{where}: {before}{key} must be a {kinds} vector, got {dtype} of shape "
                f"{list(shape)}"
            )
    if not 1 <= specs[before + "shape"].shape[0] <= DIMS:
        raise ValueError(f"{where}: {before}shape must hold 1 to {DIMS} sizes")


def _entries(file: SafetensorsFile, before: str) -> SparseActs:
    """The activations that four tensors describe.

    Raises:
        ValueError: they do not fit together.
    """

    def require(valid: bool, key: str, expected: str) -> None:
        if not valid:
            raise ValueError(f"{OP}: {file.path}: {before}{key} must {expected}")

    lengths = {key: file.specs[before + key].shape[0] for key in KEYS}
    sizes = file.run(before + "shape", 0, lengths["shape"]).tolist()
    small = min(sizes) >= 0 and math.prod(max(size, 1) for size in sizes) < 2**63
    require(small and sizes[-1] < 2**31, "shape", "hold sizes >= 0, the last below 2^31")
    n, nnz = math.prod(sizes[:-1]), lengths["indices"]
    fits = f"have n + 1 = {n + 1} elements, got {lengths['offsets']}"
    require(lengths["offsets"] == n + 1, "offsets", fits)
    require(lengths["values"] == nnz, "values", f"have {nnz} elements, as indices")
    offsets, indices, values = (file.run(before + k, 0, lengths[k]) for k in KEYS[:3])
    ascending = int(offsets[0]) == 0 and int(offsets[-1]) == nnz
    ascending = ascending and bool((offsets[1:] >= offsets[:-1]).all())
    require(ascending, "offsets", f"ascend from 0 to the {nnz} entries")
    if nnz:
        low, high = (int(v) for v in torch.aminmax(indices))
        require(low >= 0 and high < sizes[-1], "indices", f"be in [0, d_sae={sizes[-1]})")
        first = torch.zeros(nnz + 1, dtype=torch.bool, device="cpu")
        first[offsets] = True  # where a token begins, the latent may be smaller than before
        falls = (indices[1:] <= indices[:-1]) & ~first[1:-1]
        require(not bool(falls.any()), "indices", "ascend inside each token")
    return SparseActs(offsets, indices, values, torch.ones_like(values), tuple(sizes))
