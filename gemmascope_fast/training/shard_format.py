"""Files of a folder of shards: what a part, a manifest and a shard's header have to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .rows import check_layers, row_shape

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 << 20  # bytes
FORMAT, VERSION = "activation-shards", 1
ROWS = ("x", "target", "mask", "tokens")
FLOAT_CODES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def check_part(
    number: int, tensors: Mapping[str, Tensor]
) -> tuple[int, int | None, int | None, list[str]]:
    """`(d_in, d_out, layers, keys)` of what becomes shard `number`.

    Raises:
        TypeError: one is no tensor.
        ValueError: tensors are missing, unknown, or do not fit together.
    """
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(
                f"write_shards: {name} of part {number} must be a tensor or a numpy array, got "
                f"{type(t).__name__}"
            )
    x = tensors.get("x")
    if x is None or x.dim() not in (2, 3) or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"write_shards: part {number} must have a floating-point x [rows, d_in], or of several "
            "layers [rows, L, d]"
        )
    unknown = set(tensors) - set(ROWS)
    if unknown:
        raise ValueError(f"write_shards: part {number} has unknown keys {sorted(unknown)}")
    for name, t in tensors.items():
        dims = (2, 3) if name in ("x", "target") else (1,)
        if t.dim() not in dims or t.shape[0] != x.shape[0]:
            raise ValueError(
                f"write_shards: {name} of part {number} must have {x.shape[0]} rows, got shape "
                f"{tuple(t.shape)}"
            )
    target, d_out = tensors.get("target"), None
    if target is not None:
        check_layers("write_shards", f"target of part {number}", target, x)
        d_out = target.shape[1:].numel()
    return x.shape[1:].numel(), d_out, x.shape[1] if x.dim() == 3 else None, sorted(tensors)


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest, with null for what it leaves out, and a digest of its text.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it does not have the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"train: source must be a folder of shards with a {MANIFEST}, there is none in {folder}"
        )
    if path.stat().st_size > MANIFEST_LIMIT:
        raise ValueError(f"train: {path} must be at most {MANIFEST_LIMIT} bytes")
    text = path.read_bytes()
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ValueError(f"train: {path} is not JSON: {error}") from error
    if not isinstance(read, dict) or (read.get("format"), read.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"train: {path} must have format {FORMAT!r}, version {VERSION}")
    read.setdefault("special_tokens", [])
    read.setdefault("d_out", None)
    layers = read.setdefault("layers", None)
    valid = _size(read.get("d_in")) and (read["d_out"] is None or _size(read["d_out"]))
    special, shards = read["special_tokens"], read.get("shards")
    valid = valid and isinstance(special, list) and all(type(i) is int for i in special)
    valid = valid and isinstance(shards, list) and all(map(_valid_shard, shards))
    if not valid:
        raise ValueError(
            f"train: {path} must have d_in, d_out (or null), special_tokens (ids) and shards, "
            'each {"file": a name in the folder, "rows": a number}'
        )
    widths = (None, read["d_in"])
    if layers is not None and not (
        _size(layers) and read["d_in"] % layers == 0 and read["d_out"] in widths
    ):
        raise ValueError(
            f"train: {path} must have layers that divide d_in (or null), and d_out null or d_in"
        )
    return read, hashlib.sha256(text).hexdigest()


def _size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _valid_shard(shard: Any) -> bool:
    if not isinstance(shard, dict) or not isinstance(name := shard.get("file"), str):
        return False
    rows = shard.get("rows")
    return Path(name).name == name and type(rows) is int and rows >= 0


def check_shard(path: Path, rows: int, manifest: Mapping[str, Any]) -> int:
    """Compare the header of a shard with the manifest; return the bytes of an element.

    Raises:
        ValueError: they disagree, or the file is no shard.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"train: {path} must be a regular file")
    widths = {"x": manifest["d_in"], "target": manifest["d_out"]}
    wanted = {
        name: [rows, *row_shape(width, manifest["layers"])]
        for name, width in widths.items()
        if width is not None
    }
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                shape = wanted.pop(name, [rows] if name in ("mask", "tokens") else None)
                if shape is not None and part.get_shape() != shape:
                    raise ValueError(
                        f"train: {name} of {path} must have shape {shape}, got {part.get_shape()}"
                    )
                if name in ("x", "target") and part.get_dtype() not in FLOAT_CODES:
                    raise ValueError(f"train: {name} of {path} must be floating point")
            itemsize = FLOAT_CODES[file.get_slice("x").get_dtype()] if "x" not in wanted else 0
    except SafetensorError as error:
        raise ValueError(f"train: {path} is not a safetensors file: {error}") from error
    if wanted:
        raise ValueError(f"train: {path} lacks {', '.join(sorted(wanted))}")
    return itemsize
