"""Sparse activations of a long run, appended block by block and made one file at the end.

The folder `<out>.partial` holds

    run.json                              what is computed; a run goes on only with the same
    done.json                             tokens and entries that are complete, replaced atomically
    {layer}.offsets|indices|values        the arrays of the result so far, append-only

A block is appended, synced, and then counted in `done.json`; what a process that died appended
beyond that is cut off. So at whatever moment the process ends, the next one continues after the
last complete block, and the result is that of an uninterrupted run. The last step writes
`result` from the arrays and renames it to `<out>`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..artefacts import acts_files
from ..entries import cumulative
from ..sparse import SparseActs

ARRAYS = {"offsets": torch.int64, "indices": torch.int32, "values": torch.float32}
CHUNK = 8 << 20  # bytes copied at a time


class Spool:
    """The state of a run; made by `spool`."""

    def __init__(self, folder: Path, run: dict[str, Any], layers: Sequence[int | None]) -> None:
        self.folder, self.layers, self.run = folder, layers, run
        self.dtypes = {**ARRAYS, "values": getattr(torch, run["values"])}
        done = _read(folder / "done.json") or {"tokens": 0, "entries": [0] * len(layers)}
        self.tokens: int = done["tokens"]
        self.entries: list[int] = done["entries"]
        for layer in range(len(layers)):
            for name in ARRAYS:
                self._cut(layer, name)

    def append(self, acts: Sequence[SparseActs]) -> None:
        """Add the active entries of a block of tokens, one `SparseActs` per layer."""
        entries = []
        for layer, part in enumerate(acts):
            active = part.gate.cpu() > 0
            kept = cumulative(active.long())
            offsets = kept[part.offsets.cpu()] + self.entries[layer]
            self._append(layer, "offsets", offsets[1:])
            self._append(layer, "indices", part.indices.cpu()[active])
            self._append(layer, "values", part.values.cpu()[active])
            entries.append(self.entries[layer] + int(kept[-1]))
        self.tokens, self.entries = self.tokens + acts[0].n, entries
        _replace(self.folder / "done.json", {"tokens": self.tokens, "entries": entries})

    def finish(self, out: Path, shapes: Sequence[Sequence[int]], metadata: dict[str, str]) -> None:
        """Write the result, and remove what it was made from."""
        with open(self.folder / "result", "wb") as file:
            file.write(acts_files.header(self._described(shapes), metadata))
            for layer, shape in enumerate(shapes):
                file.write(_bytes(torch.zeros(1, dtype=torch.int64)))
                self._copy(layer, "offsets", file)
                file.write(_bytes(torch.tensor(shape, dtype=torch.int64)))
            for name in ("indices", "values"):
                for layer in range(len(shapes)):
                    self._copy(layer, name, file)
            _sync(file)
        os.replace(self.folder / "result", out)
        _sync_folder(out.parent)
        shutil.rmtree(self.folder)

    def _described(
        self, shapes: Sequence[Sequence[int]]
    ) -> dict[str, tuple[torch.dtype, list[int]]]:
        """The tensors of the result in the order of the file: wide ones first."""
        found: dict[str, tuple[torch.dtype, list[int]]] = {}
        for layer, shape in zip(self.layers, shapes, strict=True):
            found[acts_files.prefix(layer) + "offsets"] = (torch.int64, [self.tokens + 1])
            found[acts_files.prefix(layer) + "shape"] = (torch.int64, [len(shape)])
        for name in ("indices", "values"):
            for layer, count in zip(self.layers, self.entries, strict=True):
                found[acts_files.prefix(layer) + name] = (self.dtypes[name], [count])
        return found

    def _path(self, layer: int, name: str) -> Path:
        return self.folder / f"{layer}.{name}"

    def _append(self, layer: int, name: str, t: Tensor) -> None:
        with open(self._path(layer, name), "ab") as file:
            file.write(_bytes(t.to(self.dtypes[name])))
            _sync(file)

    def _cut(self, layer: int, name: str) -> None:
        """Drop what a process that died appended after its last complete block.

        Raises:
            ValueError: something else changed the file.
        """
        path, count = self._path(layer, name), self.entries[layer]
        size = (self.tokens if name == "offsets" else count) * self.dtypes[name].itemsize
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(f"{path} is shorter than {size} bytes: remove {self.folder}")
        os.truncate(path, size)

    def _copy(self, layer: int, name: str, file: IO[bytes]) -> None:
        with open(self._path(layer, name), "rb") as source:
            shutil.copyfileobj(source, file, CHUNK)


@contextmanager
def spool(out: Path, run: dict[str, Any], layers: Sequence[int | None]) -> Iterator[Spool]:
    """The state of the run that writes `out`, kept from other processes.

    Args:
        out: the result.
        run: what is computed, in JSON types; `values` is their dtype.
        layers: None for one, or the number of each.

    Raises:
        ValueError: another run left its state, or is at work.
    """
    folder = partial(out)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use: another process writes {out}") from error
        found = _read(folder / "run.json")
        if found is None:
            _replace(folder / "run.json", run)
        elif found != run:
            keys = [key for key in run if found.get(key) != run[key]]
            raise ValueError(
                f"{folder} was left by another run: {', '.join(keys)} differ; continue that run, "
                "or begin anew with --restart"
            )
        yield Spool(folder, run, layers)
    finally:
        os.close(descriptor)


def partial(out: Path) -> Path:
    """The folder of a run that is not complete."""
    return out.with_name(out.name + ".partial")


def _bytes(t: Tensor) -> Any:
    return t.contiguous().view(torch.uint8).numpy().data


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _replace(path: Path, value: Any) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(json.dumps(value).encode())
        _sync(file)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
