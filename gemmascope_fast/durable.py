"""Files and renames that survive a loss of power once these return, and errors that name them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def sync(file: IO[Any]) -> None:
    """Put what was written to `file` on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk: files made, renamed and removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told(op: str, argument: str, path: Path) -> Iterator[None]:
    """What the file system refuses here, as an error that names op, argument and file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or str(error.strerror).startswith(f"{op}: "):
            raise
        text = f"{op}: {argument} cannot be written: {error.strerror}"
        raise OSError(error.errno, text, str(path)) from error
