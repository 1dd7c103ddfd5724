"""A `.safetensors` file of Gemma Scope 2: one layer's tensors.

The safetensors library checks the header against the file; the bytes are then read by `pread`, not
through its mapping: pages of a mapping count as resident while it is open, and the kernel maps a
megabyte around each one that is touched, which strided and gathered reads multiply.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import config as configs
from . import files
from .validate import Region, Spec, rows_per_block

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

    Args:
        path: a regular file.
        op: named by errors.
        dtypes: of each code that the format knows.

    Raises:
        ValueError: the library finds the file damaged.
    """

    def __init__(
        self, path: Path, op: str = "load", dtypes: Mapping[str, torch.dtype] = DTYPES
    ) -> None:
        self.path, self._op, self._dtypes = path, op, dtypes
        files.check_utf8(op, path)
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
                f"{self._op}: {path} is not a safetensors file: the header must have at most "
                f"{HEADER_LIMIT} bytes, got {size}"
            )
        self.specs: dict[str, Spec] = {}
        self._starts: dict[str, int] = {}
        with self._open() as file:
            self.check_place()  # the path led here after `file` was opened: it is this one
            self.metadata: dict[str, str] = file.metadata() or {}
            header = self._parse(self._held.read(size))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                entry = file.get_slice(name)
                code = entry.get_dtype()
                self.specs[name] = Spec(tuple(entry.get_shape()), self._dtypes.get(code, code))
                self._starts[name] = 8 + size + header[name]["data_offsets"][0]

    def _parse(self, header: bytes) -> dict[str, Any]:
        """The header, which the library found valid, but for keys that occur twice."""
        try:
            found: dict[str, Any] = json.loads(header, object_pairs_hook=configs.unique)
        except ValueError as error:
            raise ValueError(f"{self._op}: {self.path}: header: {error}") from error
        return found

    def own_config(self) -> dict[str, Any] | None:
        """The config that `save_pretrained` keeps beside the tensors, or None."""
        text = self.metadata.get(CONFIG_KEY)
        return (
            None
            if text is None
            else configs.parse(text.encode(), f"{self._op}: {self.path}: config")
        )

    def supersedes(self, config: bytes) -> bool:
        """Whether `config` belongs to the artefact that this file replaced.

        A save renames `params.safetensors`, then `config.json`. A crash between the two leaves
        the old config, which the new header names by its digest.
        """
        own = self.metadata.get(CONFIG_KEY)
        return own is not None and self.metadata.get(REPLACES_KEY) == digest(config)

    def default_dtype(self) -> torch.dtype:
        """The dtype of `w_enc`."""
        return self._dtype("w_enc")

    def blocks(self, name: str, region: Region) -> Iterator[tuple[Region, Tensor]]:
        """Blocks of rows; a region of columns is read row by row."""
        first, inner = region[0], region[1:]
        sizes = tuple(part.stop - part.start for part in region)
        step = rows_per_block(sizes, self._dtype(name).itemsize)
        buffer = self._empty(name, min(step, sizes[0]), sizes[1:])
        for start in range(0, sizes[0], step):
            rows = slice(start, min(start + step, sizes[0]))
            block = buffer[: rows.stop - rows.start]
            if sizes[1:] == self.specs[name].shape[1:]:
                self._fill(block, name, first.start + start)
            else:
                for i, row in enumerate(block):
                    self._fill(row, name, first.start + start + i, inner[0].start)
            yield (rows, *(slice(0, size) for size in sizes[1:])), block

    def rows(self, name: str, chosen: Tensor) -> Tensor:
        """`[len(chosen), ...]`: rows of a tensor, and nothing else, read from the file."""
        block = self._empty(name, chosen.shape[0], self.specs[name].shape[1:])
        for row, index in zip(block, chosen.tolist(), strict=True):
            self._fill(row, name, index)
        return block

    def run(self, name: str, start: int, stop: int) -> Tensor:
        """`[stop - start]`: elements of a tensor in the order of the file."""
        block = torch.empty(stop - start, dtype=self._dtype(name), device="cpu")
        self._read(block, self._starts[name] + start * block.element_size())
        return block

    def check_place(self) -> None:
        """Raise if the path leads to another file than this one by now."""
        with suppress(FileNotFoundError):
            if _identity(self.path) == self._identity:
                return
        raise self._changed()

    def finish(self) -> None:
        """Raise if the file was written to since it was opened; being replaced does no harm."""
        if _identity(self._held.fileno()) != self._identity:
            raise self._changed()

    def close(self) -> None:
        """Let go of the file."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the file."""
        self.close()

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.specs[name].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _empty(self, name: str, rows: int, inner: tuple[int, ...]) -> Tensor:
        return torch.empty((rows, *inner), dtype=self._dtype(name), device="cpu")

    def _fill(self, block: Tensor, name: str, row: int, column: int = 0) -> None:
        """Read contiguous elements from the start of a row, or from a column of it."""
        width = math.prod(self.specs[name].shape[1:])
        self._read(block, self._starts[name] + (row * width + column) * block.element_size())

    def _read(self, block: Tensor, at: int) -> None:
        view = block.view(torch.uint8).numpy().reshape(-1).data
        while len(view):
            count = os.preadv(self._held.fileno(), [view], at)
            if count == 0:
                raise self._changed()
            view, at = view[count:], at + count

    def _changed(self) -> files.Changed:
        return files.Changed(f"{self._op}: {self.path} changed while it was read; load it again")

    def _open(self) -> Any:
        try:  # for torch it would map the file writably, which needs memory for all of it
            return safe_open(str(self.path), framework="numpy")
        except SafetensorError as error:
            self.check_place()
            raise ValueError(
                f"{self._op}: {self.path} must be a complete safetensors file: {error}"
            ) from error


def _identity(file: Path | int) -> tuple[int, ...]:
    found = os.stat(file)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
