"""Folders that writers share: made, held by one writer at a time, removed again on failure.

The lock is `flock` on the folder itself: it leaves no file behind and ends with its process,
however that ends. It holds between the threads and processes of one machine, not between the
machines of a network file system.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RACES = 100  # how often writers that fail may remove a folder that another one needs
TOKEN = re.compile(r"[0-9a-f]{16}")
_NAMES = r"params(_layer_\d+)?\.safetensors|sae(_weights)?\.safetensors|config\.json|cfg\.json"
_TEMPORARY = re.compile(rf"\.(?P<file>{_NAMES})\.(?P<token>{TOKEN.pattern})\.tmp")


class _Held(threading.local):
    """The folders (device, inode) that this thread holds."""

    def __init__(self) -> None:
        self.folders: set[tuple[int, int]] = set()


_held = _Held()


@contextmanager
def written(op: str, folder: Path) -> Iterator[None]:
    """Make `folder` and hold it; on failure the folders that were made go again, if empty.

    Raises:
        RuntimeError: this thread holds it already.
        ValueError: `folder` lies below a file, or is a link that leads nowhere.
    """
    made: list[Path] = []
    try:
        descriptor = _make_and_open(op, folder, made)
        with _lock(op, folder, descriptor, fcntl.LOCK_EX):
            try:
                yield
            except BaseException:
                _remove(made)  # while nobody else is writing into it
                raise
    except BaseException:
        _remove(made)
        raise


@contextmanager
def read(op: str, folder: Path) -> Iterator[None]:
    """Keep writers out of `folder`.

    Raises:
        RuntimeError: this thread is writing to it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with _lock(op, folder, descriptor, fcntl.LOCK_SH):
        yield


def new_token() -> str:
    """What the temporary names of one save have in common."""
    return secrets.token_hex(8)


def temporary_name(name: str, token: str) -> str:
    """The name, which no other save uses, under which `name` is written first."""
    return f".{name}.{token}.tmp"


def temporary_of(name: str, token: str) -> str | None:
    """The file that a save with this token writes first under `name`, or None."""
    match = _TEMPORARY.fullmatch(name)
    return match["file"] if match and match["token"] == token else None


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left; only while `folder` is held, or writers may be alive."""
    for name in os.listdir(folder):
        if _TEMPORARY.fullmatch(name):
            with suppress(OSError):  # another user's: it is in nobody's way
                os.unlink(folder / name)


def _make_and_open(op: str, folder: Path, made: list[Path]) -> int:
    """A descriptor of `folder`, locked, which is still in its place."""
    for _ in range(RACES):
        with suppress(FileNotFoundError):
            _make(op, folder, made)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _refuse_twice(op, folder, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _identity(descriptor) == _identity(folder):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    raise FileNotFoundError(f"{op}: {folder} cannot be made, or is removed as soon as it is")


def _make(op: str, folder: Path, made: list[Path]) -> None:
    """Make `folder` and its parents; those that were missing join `made`."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    for path in reversed(missing):
        try:
            path.mkdir()
            made.append(path)
        except FileExistsError as error:  # another writer's, or `a/..`
            if path.is_symlink() and not path.exists():
                raise ValueError(
                    f"{op}: path must be a folder, and {path} is a link that leads nowhere"
                ) from error
        except NotADirectoryError as error:
            raise ValueError(
                f"{op}: path must be a folder, and {folder} lies below a file"
            ) from error


@contextmanager
def _lock(op: str, folder: Path, descriptor: int, mode: int) -> Iterator[None]:
    """Hold what `descriptor` names, then close it."""
    try:
        key = _refuse_twice(op, folder, descriptor)
        fcntl.flock(descriptor, mode)
        _held.folders.add(key)
        try:
            yield
        finally:
            _held.folders.discard(key)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # now, even if a forked child has it open
    finally:
        os.close(descriptor)


def _refuse_twice(op: str, folder: Path, descriptor: int) -> tuple[int, int]:
    """The folder's identity; waiting for oneself would last for ever."""
    key = _identity(descriptor)
    if key in _held.folders:
        raise RuntimeError(
            f"{op}: this thread is in the middle of saving to {folder}: a signal handler must "
            "set a flag, and the program save later"
        )
    return key


def _identity(file: int | Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _remove(made: list[Path]) -> None:
    """Remove the folders that are empty, the deepest first."""
    while made:
        with suppress(OSError):  # somebody else's file arrived meanwhile
            made.pop().rmdir()
