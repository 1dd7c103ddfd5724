"""Checkpoints: everything a run needs to go on with the same bits, written atomically.

    folder/step-000000400.safetensors       tensors, and a JSON record in the header

A checkpoint is written under a temporary name, synced, renamed, and the rename synced; the one
before stays, older ones go. So at every moment, whatever stops the process, the newest file that
has a final name is whole. A checkpoint holds tensors and JSON only: nothing in it is executed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..durable import sync, sync_folder, told

KEPT = 2
RECORD, TRANSPOSED = "run", "transposed"
BLOCK_BYTES = 16 << 20
NAME = re.compile(r"step-(\d{9,})\.safetensors")
TEMPORARY = re.compile(r"\.step-\d{9,}\.safetensors\.\d+\.tmp")
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `KEPT`.

    Args:
        folder: made if missing.
        step: steps taken.
        tensors: any device, any strides; 2-D transposes keep their layout.
        record: what else the run needs, as JSON.

    Returns:
        The file.

    Raises:
        OSError: the file system refuses (it is full, say); the checkpoints before stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    for leftover in folder.iterdir():
        if TEMPORARY.fullmatch(leftover.name):
            with suppress(FileNotFoundError):
                leftover.unlink()
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with told("train", "out", path):
            with open(temporary, "xb") as file:
                _write(file, tensors, record)
                sync(file)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    for _, old in found(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[tuple[int, Path]]:
    """`(step, file)` of every checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    named = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def superseded(saved: list[tuple[int, Path]], resumed: Path) -> list[Path]:
    """Of what `found` gave, older files than a run that goes on from `resumed` keeps.

    The save of `resumed` removed them, unless the process was stopped before it could.
    """
    paths = [path for _, path in saved]
    return paths[: max(paths.index(resumed) - (KEPT - 1), 0)]


def load_record(path: Path) -> dict[str, Any]:
    """What `save` was given beside the tensors.

    Raises:
        ValueError: the file is not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(RECORD)
        read = json.loads(text) if text is not None else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"train: {path} is not a whole checkpoint: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"train: {path} is a safetensors file, but not a checkpoint")
    return read


def load_into(path: Path, tensors: Mapping[str, Tensor], others: str) -> None:
    """Copy a checkpoint's tensors into `tensors`, one at a time.

    Args:
        path: of the checkpoint.
        tensors: receive the values.
        others: prefix of the tensors in the file that `read` returns instead.

    Raises:
        ValueError: names, shapes or dtypes differ; nothing has been changed then.
    """
    with safe_open(path, framework="pt") as file:
        names = {name for name in file.keys() if not name.startswith(others)}
        if names != set(tensors):
            differing = ", ".join(sorted(names ^ set(tensors)))
            raise ValueError(f"train: {path} does not fit this run: {differing}")
        for name, t in tensors.items():
            part, kept = file.get_slice(name), _rows(t)
            if part.get_shape() != list(kept.shape) or part.get_dtype() != CODES[t.dtype]:
                raise ValueError(
                    f"train: {name} of {path} must be {t.dtype} {list(kept.shape)}, got "
                    f"{part.get_dtype()} {part.get_shape()}"
                )
        with torch.no_grad():
            for name, t in tensors.items():
                _rows(t).copy_(file.get_tensor(name))


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, in the strides they were saved with."""
    with safe_open(path, framework="pt") as file:
        transposed = set(json.loads(file.metadata()[TRANSPOSED]))
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    return {name: t.t() if name in transposed else t for name, t in tensors.items()}


def _rows(t: Tensor) -> Tensor:
    """`t`, or its transpose where that is the contiguous one: what is stored."""
    return t.t() if t.dim() == 2 and not t.is_contiguous() and t.t().is_contiguous() else t


def _write(file: IO[bytes], tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """The safetensors format in blocks: the library's writer would hold a copy of every tensor."""
    turned = [name for name, t in tensors.items() if _rows(t) is not t]
    metadata = {RECORD: json.dumps(record), TRANSPOSED: json.dumps(turned)}
    header: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        t = _rows(tensors[name].detach())
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": CODES[t.dtype], "shape": t.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        flat = _rows(tensors[name].detach()).reshape(-1)
        for part in torch.split(flat, max(BLOCK_BYTES // flat.element_size(), 1)):
            file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)


def as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` as it reads after it was saved: tuples are lists."""
    return dict(json.loads(json.dumps(record)))


def refuse_shards(folder: Path) -> None:
    """A run on a mesh goes on on a mesh, of one rank if need be."""
    if folder.is_dir() and any(folder.glob("step-*[0-9]/run.json")):
        raise ValueError(
            f"train: {folder} holds checkpoints of a run on a mesh: pass mesh=, resume=False or "
            "another out"
        )


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`; the lock ends with the process, however that ends."""
    with told("train", "out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"train: another run is writing to {folder}") from error
        yield
    finally:
        os.close(descriptor)
