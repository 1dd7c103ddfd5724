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

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..artefacts import acts_files
from ..durable import sync, sync_folder
from ..entries import cumulative
from ..sparse import SparseActs

ARRAYS = {"offsets": torch.int64, "indices": torch.int32, "values": torch.float32}
CHUNK = 8 << 20  # bytes copied at a time
LIMIT = 1 << 20  # bytes of a small file


class Spool:
    """The state of a run; made by `spool`."""

    def __init__(self, folder: Path, run: dict[str, Any], layers: Sequence[int | None]) -> None:
        self.folder, self.layers, self.run = folder, layers, run
        self.dtypes = {**ARRAYS, "values": getattr(torch, run["values"])}
        done = _read(folder / "done.json")
        if done is None:
            done = {"tokens": 0, "entries": [0] * len(layers)}
        self.tokens, self.entries = _counts(folder / "done.json", done, len(layers))
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
        with open(self.folder / "result", "wb", opener=_inside) as file:
            file.write(acts_files.header(self._described(shapes), metadata))
            for layer, shape in enumerate(shapes):
                file.write(_bytes(torch.zeros(1, dtype=torch.int64, device="cpu")))
                self._copy(layer, "offsets", file)
                file.write(_bytes(torch.tensor(shape, dtype=torch.int64, device="cpu")))
            for name in ("indices", "values"):
                for layer in range(len(shapes)):
                    self._copy(layer, name, file)
            sync(file)
        os.replace(self.folder / "result", out)
        sync_folder(out.parent)
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
        with open(self._path(layer, name), "ab", opener=_inside) as file:
            file.write(_bytes(t.to(self.dtypes[name])))
            sync(file)

    def _cut(self, layer: int, name: str) -> None:
        """Drop what a process that died appended after its last complete block.

        Raises:
            ValueError: something else changed the file.
        """
        path, count = self._path(layer, name), self.entries[layer]
        size = (self.tokens if name == "offsets" else count) * self.dtypes[name].itemsize
        with open(path, "ab", opener=_inside) as file:
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(f"{path} is shorter than {size} bytes: remove {self.folder}")
            file.truncate(size)

    def _copy(self, layer: int, name: str, file: IO[bytes]) -> None:
        with open(self._path(layer, name), "rb", opener=_inside) as source:
            shutil.copyfileobj(source, file, CHUNK)


@contextmanager
def spool(
    out: Path, run: dict[str, Any], layers: Sequence[int | None], *, restart: bool = False
) -> Iterator[Spool]:
    """The state of the run that writes `out`, kept from other processes.

    Args:
        out: the result.
        run: what is computed, in JSON types; `values` is their dtype.
        layers: None for one, or the number of each.
        restart: whether what a run left is removed.

    Raises:
        ValueError: another run left its state or is at work, or the state is damaged.
    """
    folder = partial(out)
    folder.mkdir(exist_ok=True)
    descriptor = _inside(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use: another process writes {out}") from error
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise ValueError(f"{folder} is in use: another process wrote {out} just now")
        for path in folder.iterdir() if restart else ():
            path.unlink()
        found = _read(folder / "run.json")
        if found is None:
            (folder / "done.json").unlink(missing_ok=True)  # of a run that was being removed
            _replace(folder / "run.json", run)
        elif not isinstance(found, dict) or found != run:
            found = found if isinstance(found, dict) else {}
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
    """What a small file holds, None where there is none.

    Raises:
        ValueError: it is no JSON.
    """
    if not os.path.lexists(path):
        return None
    with open(path, "rb", opener=_inside) as file:
        try:
            return json.loads(file.read(LIMIT))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: remove {path.parent}") from error


def _counts(path: Path, done: Any, layers: int) -> tuple[int, list[int]]:
    """Tokens, and entries of each layer.

    Raises:
        ValueError: they are none.
    """
    found = done if isinstance(done, dict) else {}
    tokens, entries = found.get("tokens"), found.get("entries")
    counts = [tokens, *entries] if isinstance(entries, list) else []
    good = all(type(count) is int and 0 <= count < 2**62 for count in counts)
    if not good or len(counts) != 1 + layers:
        raise ValueError(f"{path} is damaged: remove {path.parent}")
    return counts[0], counts[1:]


def _inside(path: Any, flags: int) -> int:
    """Open what is itself in the folder: a link could lead to a file that is not ours to change.

    Raises:
        ValueError: it is a link, a pipe or a device.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise ValueError(f"{path} must be no link, and no pipe: remove it") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise ValueError(f"{path} must be no link, and no pipe: remove it")
    return descriptor


def _replace(path: Path, value: Any) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb", opener=_inside) as file:
        file.write(json.dumps(value).encode())
        sync(file)
    os.replace(temporary, path)
    sync_folder(path.parent)
