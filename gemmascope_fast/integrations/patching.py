"""What the integrations share: changes to a host library that can be undone, and version gates."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from importlib import metadata
from types import ModuleType, TracebackType
from typing import Any, Self

import torch

_MISSING = object()


class _Change:
    """`value` in the place of what stood there, of an attribute or of an entry of a mapping."""

    def __init__(
        self,
        place: tuple[int, Any],
        read: Callable[[], Any],
        write: Callable[[Any], None],
        value: Any,
    ) -> None:
        with _lock:
            self.place, self.read, self.write, self.old = place, read, write, read()
            write(value)
            self.mine, self.number = read(), next(_numbering)
            _standing[self.number] = self

    def undo(self) -> None:
        """Put back what stood there; a later change stays, and will put that back in its turn."""
        with _lock:
            del _standing[self.number]
            for later in list(_standing.values()):
                over = later.place == self.place and later.number > self.number
                if over and later.old is self.mine:
                    later.old = self.old
                    return
            if self.read() is self.mine:
                self.write(self.old)


_lock = threading.RLock()
_numbering = itertools.count()
_standing: weakref.WeakValueDictionary[int, _Change] = weakref.WeakValueDictionary()
"""Changes that can still be undone, in the order in which they were made."""


class Changes:
    """Changes to a host, undone in reverse order; a context manager that undoes them at its end.

    A change that somebody else has overwritten since is left alone when ours is undone: what
    stands there then is theirs. Of two `Changes` to one place either may be undone first.

    Args:
        undone: called once, after the changes are undone.
    """

    def __init__(self, undone: Callable[[], None] | None = None) -> None:
        self._undo: list[Callable[[], None]] = []
        self._undone = undone

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`; undoing restores what its own namespace held, or removes the name."""

        def write(value: Any) -> None:
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

        def read() -> Any:
            return vars(owner).get(name, _MISSING)

        self._undo.append(_Change((id(owner), name), read, write, value).undo)

    def methods(self, obj: Any, methods: Mapping[str, Any]) -> None:
        """Set bound methods on one object, of which copies and pickles are made without them."""
        for name, method in methods.items():
            self.attribute(obj, name, method)

        def state() -> Any:
            found = type(obj).__getstate__(obj)  # type: ignore[call-arg]
            if not isinstance(found, dict):
                return found
            ours = {**methods, "__getstate__": state}
            return {
                name: value for name, value in found.items() if value is not ours.get(name, obj)
            }

        self.attribute(obj, "__getstate__", state)

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set `mapping[key]`; undoing restores the old value, or removes the key."""

        def write(value: Any) -> None:
            if value is _MISSING:
                del mapping[key]
            else:
                mapping[key] = value

        def read() -> Any:
            return mapping.get(key, _MISSING)

        self._undo.append(_Change((id(mapping), key), read, write, value).undo)

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
