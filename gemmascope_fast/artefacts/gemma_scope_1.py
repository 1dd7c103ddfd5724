"""`params.npz` of Gemma Scope 1: a zip of `.npy` members, never unpickled.

Before anything is allocated the directory's size, the members' names, places and sizes, and the
shape that each `.npy` header declares are checked against the file.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .validate import Region, Spec, rows_per_block

PARAMS = "params.npz"
KEYS = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
KEYS |= {"threshold": "threshold"}
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
DIRECTORY_LIMIT = 64 << 10  # bytes; five members need about 300
INFLATION_LIMIT = 16  # declared bytes per byte of the file; trained float32 weights: 1.1
INFLATION_SLACK = 1 << 20  # bytes; small files may be all zeros

_PIECE = 1 << 20


class NpzFile:
    """An open archive; `TensorFile` says what it offers.

    Raises:
        ValueError: the archive is damaged, or declares what it cannot hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._members: dict[str, _Member] = {}
        self._file = open(path, "rb")  # until close
        try:
            start = _check_end(self._file, f"load: {path}")
            with self._damage("the archive"):
                self._zip = zipfile.ZipFile(self._file)
            infos = self._zip.infolist()
            _check_directory(infos, start, f"load: {path}")
            for info in infos:
                self._add(info)
        except BaseException:
            self._file.close()
            raise

    def default_dtype(self) -> torch.dtype:
        """The dtype of `w_enc`, or float32 for float64 (numpy's default, seldom meant)."""
        dtype = self.specs["w_enc"].dtype
        assert isinstance(dtype, torch.dtype)
        return torch.float32 if dtype == torch.float64 else dtype

    def blocks(self, name: str, region: Region) -> Iterator[tuple[Region, Tensor]]:
        """Blocks of rows, or of columns when the member is in Fortran order.

        The whole member is read: zipfile compares the checksum when the last byte is.
        """
        member = self._members[name]
        native = member.dtype.newbyteorder("=")
        shape = member.shape[::-1] if member.fortran else member.shape
        step = rows_per_block(shape, native.itemsize)
        with self._damage(member.info.filename):
            stream = self._zip.open(member.info)
            stream.read(member.start)  # not seek: that switches the checksum off
        with stream:
            for start in range(0, shape[0], step):
                rows = slice(start, min(start + step, shape[0]))
                buffer = np.empty((rows.stop - start, *shape[1:]), member.dtype)
                with self._damage(member.info.filename):
                    _read_exactly(stream, buffer)
                block = torch.from_numpy(buffer.astype(native, copy=False))
                place = (rows, *(slice(0, size) for size in shape[1:]))
                if member.fortran:
                    place, block = place[::-1], block.T
                yield _clipped(place, block, region)
                del buffer, block

    def finish(self) -> None:
        """Nothing to do: one open file, and every member's checksum was compared."""

    def _add(self, info: zipfile.ZipInfo) -> None:
        """Read the `.npy` header of a member; its size must be what the header declares."""
        with self._damage(info.filename), self._zip.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            else:
                raise ValueError(f"version {version} of the npy format is not supported")
            start = stream.tell()
        where = f"load: {self.path}: {info.filename}"
        native = dtype.newbyteorder("=").name
        if native not in DTYPES:
            raise ValueError(f"{where} must be float16, float32 or float64, got {dtype!r:.80}")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{where} must have sizes >= 0, got shape {shape!r:.80}")
        declared = start + math.prod(shape) * dtype.itemsize
        if declared != info.file_size:
            raise ValueError(
                f"{where} declares shape {shape!r:.80}, {declared} bytes with its header, but the "
                f"archive holds {info.file_size}"
            )
        name = KEYS[info.filename.removesuffix(".npy")]
        self.specs[name] = Spec(shape, DTYPES[native])
        self._members[name] = _Member(info, start, shape, fortran and len(shape) > 1, dtype)

    @contextmanager
    def _damage(self, member: str) -> Iterator[None]:
        """Turn whatever zipfile, zlib and numpy raise into an error that names the member."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"load: {self.path}: {member} is damaged or truncated: "
                f"{type(error).__name__}: {error!s:.200}"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        self._zip.close()
        self._file.close()


@dataclass(frozen=True)
class _Member:
    """A `.npy` member: `start` bytes of header, then `shape` elements of `dtype`."""

    info: zipfile.ZipInfo
    start: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def _check_end(file: IO[bytes], where: str) -> int:
    """Where the zip directory starts; its size is bounded before zipfile builds objects of it."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    end = tail[-22:]
    if not end.startswith(b"PK\5\6") or end[20:] != b"\0\0":
        raise ValueError(
            f"{where} must be a complete .npz archive; its end record is missing (truncated?)"
        )
    directory, after = int.from_bytes(end[12:16], "little"), 22
    if tail[-42:].startswith(b"PK\6\7") and tail.startswith(b"PK\6\6"):  # zip64: 56 + 20 bytes
        directory, after = int.from_bytes(tail[40:48], "little"), 98
    if directory > min(DIRECTORY_LIMIT, size - after):
        raise ValueError(
            f"{where}: the zip directory must have at most {DIRECTORY_LIMIT} bytes and fit the "
            f"file, got {directory}"
        )
    return size - after - directory


def _check_directory(infos: list[zipfile.ZipInfo], start: int, where: str) -> None:
    """Names, methods, places and sizes that the directory declares."""
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        if name != info.orig_filename or name.removesuffix(".npy") not in KEYS or name in KEYS:
            raise ValueError(
                f"{where}: members must be {', '.join(KEYS)} (.npy), got {info.orig_filename!r:.80}"
            )
        if name in seen:
            raise ValueError(f"{where}: member {name} must occur once, and occurs twice")
        seen.add(name)
        stored = info.compress_type == zipfile.ZIP_STORED
        if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
            raise ValueError(f"{where}: {name} must be stored or deflated, got another method")
        if stored and info.compress_size != info.file_size:
            raise ValueError(
                f"{where}: {name} is stored, so its two sizes must agree, got "
                f"{info.compress_size} and {info.file_size}"
            )
    ordered = sorted(infos, key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in ordered), start][1:]
    for info, end in zip(ordered, ends, strict=True):
        if info.header_offset < 0 or info.header_offset + 30 + info.compress_size > end:
            raise ValueError(
                f"{where}: {info.filename} declares {info.compress_size} bytes, which overlap the "
                "next member or exceed the file"
            )
    total, limit = sum(info.file_size for info in infos), INFLATION_LIMIT * start + INFLATION_SLACK
    if total > limit:
        raise ValueError(
            f"{where}: the members declare {total} bytes in a file of {start}; at most {limit} "
            "are accepted (a zip bomb?)"
        )


def _clipped(place: Region, block: Tensor, region: Region) -> tuple[Region, Tensor]:
    """What of `block`, which lies at `place` of a tensor, is in `region`, and where in it."""
    index = []
    for dim, (own, wanted) in enumerate(zip(place, region, strict=True)):
        start = max(own.start, wanted.start)
        stop = max(start, min(own.stop, wanted.stop))
        block = block.narrow(dim, min(start, own.stop) - own.start, stop - start)
        index.append(slice(start - wanted.start, stop - wanted.start))
    return tuple(index), block


def _read_exactly(stream: IO[bytes], buffer: np.ndarray[Any, Any]) -> None:
    """Fill `buffer`, by pieces: zipfile's own copy of a piece stays small."""
    view = buffer.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        piece = stream.read(min(_PIECE, len(view) - done))
        if not piece:
            raise EOFError(f"{len(view) - done} bytes are missing")
        view[done : done + len(piece)] = piece
        done += len(piece)
