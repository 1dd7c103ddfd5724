"""Which files of a folder may be opened.

Policy: only names that this package knows are opened, only regular files, and a link must stay
inside the folder. One exception, because the Hugging Face Hub's cache is made of such links:
below `<repository>/snapshots/`, a link may lead to `<repository>/blobs/`. A file that the caller
names directly may be any link.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

CONFIG = "config.json"
TRIES = 3  # of a file that is there and cannot be found
CONFIG_LIMIT = 64 << 10  # bytes; published ones have about 300


class Changed(ValueError):
    """A file was replaced while it was read."""


def member(folder: Path, name: str) -> Path | None:
    """The regular file `name` of `folder`, or None if there is no such entry.

    Raises:
        ValueError: it is not a regular file, or a link that leaves the folder.
    """
    path = folder / name
    for tries in range(TRIES, 0, -1):
        if not os.path.lexists(path):
            return None
        try:
            target, root = path.resolve(strict=True), folder.resolve()
            break
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, below Python 3.13
            if path.is_symlink():
                raise ValueError(f"load: {path} is a link that leads nowhere") from error
            if tries == 1:  # else a save removed it just now, and may have written it again
                raise ValueError(f"load: {path} leads nowhere: {error}") from error
    if not target.is_relative_to(root) and target.parent != _hub_blobs(root):
        raise ValueError(
            f"load: {path} is a link that leaves its folder; pass the file or folder it leads to"
        )
    return regular(path)


def regular(path: Path, op: str = "load") -> Path:
    """Return `path`, which must lead to a readable regular file."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise _unreadable(path, op) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"{op}: {path} must be a regular file, and is {kind}")
    try:
        os.close(os.open(path, os.O_RDONLY))  # `os.access` cannot tell unreadable from gone
    except PermissionError as error:
        raise _unreadable(path, op) from error
    return path


def config_bytes(folder: Path) -> bytes | None:
    """The first `CONFIG_LIMIT + 1` bytes of `config.json`, or None without one."""
    path = member(folder, CONFIG)
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read(CONFIG_LIMIT + 1)


def check_utf8(op: str, path: Path) -> None:
    """Refuse names that the safetensors library cannot open.

    Raises:
        ValueError: the path is not valid UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{op}: the path must be valid UTF-8, since the safetensors library opens no other, "
            f"got {str(path)!a}: rename it"
        ) from error


def _unreadable(path: Path, op: str) -> PermissionError:
    return PermissionError(f"{op}: {path} cannot be read: give yourself read permission")


def existing(path: Path, op: str) -> Path:
    """Return `path`, which must lead to a readable regular file.

    Raises:
        FileNotFoundError: it leads nowhere.
        PermissionError: it cannot be read.
        ValueError: it is something else, or cannot be the path of a file.
    """
    try:
        return regular(path, op)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{op}: {path} does not exist") from error
    except PermissionError:
        raise
    except OSError as error:  # too long, a loop of links
        raise ValueError(f"{op}: {str(path):.80} must be a path: {error.strerror}") from error


def _hub_blobs(root: Path) -> Path | None:
    """`<repository>/blobs` when `root` lies below `<repository>/snapshots` of a Hub cache."""
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent / "blobs"
    return None
