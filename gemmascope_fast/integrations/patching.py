"""What the integrations share: changes to a host library that can be undone, and version gates."""

from __future__ import annotations

import functools
import importlib
import re
import threading
from collections.abc import Callable, MutableMapping
from importlib import metadata
from types import ModuleType, TracebackType
from typing import Any, Self

import torch

_MISSING = object()


class Changes:
    """Changes to a host, undone in reverse order; a context manager that undoes them at its end.

    A change that somebody else has overwritten since is left alone when ours is undone: what
    stands there then is theirs.

    Args:
        undone: called once, after the changes are undone.
    """

    def __init__(self, undone: Callable[[], None] | None = None) -> None:
        self._undo: list[Callable[[], None]] = []
        self._undone = undone

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`; undoing restores what its own namespace held, or removes the name."""
        namespace = vars(owner)
        old = namespace.get(name, _MISSING)
        setattr(owner, name, value)
        mine = vars(owner).get(name, _MISSING)

        def undo() -> None:
            if vars(owner).get(name, _MISSING) is not mine:
                return
            if old is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

        self._undo.append(undo)

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set `mapping[key]`; undoing restores the old value, or removes the key."""
        old = mapping.get(key, _MISSING)
        mapping[key] = value

        def undo() -> None:
            if mapping.get(key, _MISSING) is not value:
                return
            if old is _MISSING:
                del mapping[key]
            else:
                mapping[key] = old

        self._undo.append(undo)

    def finally_(self, undo: Callable[[], None]) -> None:
        """Have `undo` called where the changes are taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Take everything back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        undone, self._undone = self._undone, None
        if undone is not None:
            undone()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


class Installation:
    """The changes of a host's `install`, made at most once at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changes: Changes | None = None

    def begin(self, make: Callable[[Changes], None]) -> Changes:
        """The changes that `make` makes; where they stand already, an empty set of changes.

        Leaving the block of a second `install` thus leaves the first in place.
        """
        with self._lock:
            if self._changes is not None:
                return Changes()
            changes = Changes(self._ended)
            try:
                make(changes)
            except BaseException:
                changes.undo()
                raise
            self._changes = changes
            return changes

    def end(self) -> None:
        """Undo the changes that stand."""
        with self._lock:
            if self._changes is not None:
                self._changes.undo()

    def _ended(self) -> None:
        self._changes = None


def fusing(own: Callable[..., None]) -> Callable[..., None]:
    """A trainer's `__init__` that makes its `torch.optim.Adam` fused.

    The update is the same, its operands read and written once.

    Args:
        own: the host's, which leaves `optimizer` or `optimizers` on the trainer.
    """

    @functools.wraps(own)
    def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
        own(trainer, *args, **kwargs)
        one = getattr(trainer, "optimizer", None)
        for optimizer in getattr(trainer, "optimizers", [one]):
            if type(optimizer) is torch.optim.Adam:
                for group in optimizer.param_groups:
                    group["fused"] = True

    return init


def require(module: str, distribution: str, *, at_least: str, below: str) -> ModuleType:
    """The host library, imported, of a version this backend was written for.

    Args:
        module: import name.
        distribution: name on PyPI.
        at_least: oldest version that is served, as "6.40".
        below: first version that is not.

    Raises:
        ImportError: it is not installed, is broken, or is of another version.
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"gemmascope_fast.integrations: {distribution} is not installed: "
            f'pip install "{distribution}>={at_least},<{below}"'
        ) from error
    if not _numbers(at_least) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"gemmascope_fast.integrations: {distribution} must be >= {at_least} and < {below}, "
            f"whose internals this was written for; {found} is installed"
        )
    return importlib.import_module(module)


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version; what follows them (rc1, .dev0, +local) does not count."""
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match[1].split(".")) if match else ()
