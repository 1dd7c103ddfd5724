"""`params.safetensors` of a single-layer Gemma Scope 2 artefact, read through safetensors.

The library maps the file. Pages of a mapping count as resident while it is open, so every block
opens its own (0.3 ms): the peak stays a few blocks above the weights. That the file is the same
each time is checked by its identity.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import config as configs
from . import files
from .validate import Spec, rows_per_block

PARAMS = "params.safetensors"
HEADER_LIMIT = 1 << 20  # bytes; six tensors need 600, an embedded config at most 400 thousand
CONFIG_KEY = "config"
REPLACES_KEY = "replaces"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def digest(data: bytes) -> str:
    """SHA-256 by which `params.safetensors` names the `config.json` that its save replaced."""
    return hashlib.sha256(data).hexdigest()


class SafetensorsFile:
    """An open artefact; `TensorFile` says what it offers.

    Raises:
        ValueError: the library finds the file damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files.check_utf8("load", path)
        self._held = open(path, "rb")  # while it is open, no other file gets its identity
        try:
            self._identity = _identity(self._held.fileno())
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        path, size = self.path, int.from_bytes(self._held.read(8), "little")
        if size > HEADER_LIMIT:
            raise ValueError(
                f"load: {path}: the header must have at most {HEADER_LIMIT} bytes, got {size}"
            )
        self.specs: dict[str, Spec] = {}
        with self._open() as file:
            self.finish()
            self.metadata: dict[str, str] = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                entry = file.get_slice(name)
                dtype = entry.get_dtype()
                self.specs[name] = Spec(tuple(entry.get_shape()), DTYPES.get(dtype, dtype))

    def own_config(self) -> dict[str, Any] | None:
        """The config that `save_pretrained` keeps beside the tensors, or None."""
        text = self.metadata.get(CONFIG_KEY)
        return None if text is None else configs.parse(text.encode(), f"load: {self.path}: config")

    def supersedes(self, config: bytes) -> bool:
        """Whether `config` belongs to the artefact that this file replaced.

        A save renames `params.safetensors`, then `config.json`. A crash between the two leaves
        the old config, which the new header names by its digest.
        """
        own = self.metadata.get(CONFIG_KEY)
        return own is not None and self.metadata.get(REPLACES_KEY) == digest(config)

    def default_dtype(self) -> torch.dtype:
        """The dtype of `w_enc`."""
        dtype = self.specs["w_enc"].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def blocks(self, name: str) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Blocks of rows."""
        shape, dtype = self.specs[name]
        assert isinstance(dtype, torch.dtype)
        step = rows_per_block(shape, dtype.itemsize)
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            with self._open() as file:
                self.finish()  # the path led to this file after `file` was opened: it is this one
                block = file.get_slice(name)[rows]
            yield (rows,), block
            del block

    def finish(self) -> None:
        """Raise if the file was replaced or changed meanwhile."""
        if _identity(self.path) != self._identity:
            raise files.Changed(f"load: {self.path} changed while it was read; load it again")

    def close(self) -> None:
        """Let go of the file."""
        self._held.close()

    def _open(self) -> Any:
        try:
            return safe_open(str(self.path), framework="pt")
        except (SafetensorError, RuntimeError) as error:  # it opens the path twice: header, map
            self.finish()
            raise ValueError(
                f"load: {self.path} must be a complete safetensors file: {error}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the file."""
        self.close()


def _identity(file: Path | int) -> tuple[int, ...]:
    found = os.stat(file)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
