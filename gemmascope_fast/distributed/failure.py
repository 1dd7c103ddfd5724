"""How a run on several ranks ends when one of them fails, dies or stands still.

A collective that lacks a rank fails on its neighbours at once (gloo, where the process is gone) or
after the process group's timeout, on the others when their neighbours have ended. Which rank began
they learn from the store of the process group: a thread of every rank writes there once a second
that it lives, and reads whether somebody has found a rank to blame.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from .communication import Group

BEAT = 1.0
"""Seconds between two signs of life."""
PATIENCE = 4.0
"""Beats after which a rank that gave none is lost."""

SETTLE = 0.1
"""Seconds, at the end of a run, for gloo's threads to let go of what they sent.

Letting go of a tensor takes the interpreter's lock, which aborts the process where the interpreter
is ending ("terminate called without an active exception"); nothing tells that they have done so,
and `destroy_process_group` does not wait for them.
"""

Verdict = dict[str, Any]
"""`text`, and the `ranks` to blame."""


class RankError(RuntimeError):
    """A rank failed, died, stood still, or is about to do something else than the others.

    Attributes:
        ranks: those that are to blame, as far as it is known.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


@contextmanager
def guarded(op: str, alike: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Turn the failure of a collective into a `RankError` on every rank.

    An error of this rank's own is raised as it is, and told to the others.

    Args:
        op: begins the message.
        alike: errors that all ranks raise together.
    """
    watch = _Watch()
    patience: float | None = None
    try:
        yield
    except alike:
        raise
    except BaseException as error:
        patience = BEAT  # the store may not answer any more
        if not _is_collective(error):
            text = f"rank {watch.rank} failed: {type(error).__name__}: {error}"
            watch.publish({"text": text, "ranks": [watch.rank]})
            raise
        verdict = watch.judge()
        raise RankError(f"{op}: {verdict['text']}", verdict["ranks"]) from error
    finally:
        watch.stop(patience)
        time.sleep(SETTLE)


def limit(groups: list[Group | None], device: torch.device) -> None:
    """Give groups the timeout of `init_process_group`, which a mesh does not pass on to its own.

    Args:
        groups: of a mesh.
        device: whose backend has it.
    """
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(device).options._timeout
    for group in groups:
        if group is not None:
            _set_pg_timeout(timeout, group)


class _Watch:
    """This rank's thread, and what it knows of the others.

    Attributes:
        rank: this one.
        verdict: who is to blame, once somebody knows.
    """

    def __init__(self) -> None:
        self._key = f"gemmascope_fast/{_counted()}"
        self.rank, self._world = dist.get_rank(), dist.get_world_size()
        self._store = _get_default_store()
        self.verdict: Verdict | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="gemmascope_fast", daemon=True)
        self._thread.start()

    def stop(self, patience: float | None) -> None:
        """End the thread: one that is in a call of the store aborts the process when that exits."""
        self._ended.set()
        self._thread.join(patience)

    def publish(self, verdict: Verdict) -> Verdict:
        """Tell all ranks, unless another verdict was first; returns the one that counts."""
        key, text = f"{self._key}/verdict", json.dumps(verdict)
        said = _within(PATIENCE * BEAT, lambda: self._store.compare_set(key, "", text))
        if said is not None:
            self.verdict = json.loads(said)
            time.sleep(2 * BEAT)  # for the others to read: the store may live in this process
        return self.verdict or verdict

    def judge(self) -> Verdict:
        """Who is to blame for a collective that failed here."""
        before = _within(PATIENCE * BEAT, self._beats)
        end = time.monotonic() + PATIENCE * BEAT
        while self.verdict is None and time.monotonic() < end:
            time.sleep(BEAT / 10)
        if self.verdict is not None:
            return self.verdict
        after = _within(PATIENCE * BEAT, self._beats)
        if before is None or after is None:
            text = "the store of the process group does not answer: whoever holds it died or stands"
            return {"text": f"{text} still (rank 0, where it is not torchrun)", "ranks": [0]}
        lost = [rank for rank in range(self._world) if before[rank] == after[rank]]
        if not lost:
            text = f"a collective failed on rank {self.rank}, and all {self._world} ranks live"
            return self.publish({"text": text, "ranks": []})
        names = ", ".join(map(str, lost))
        text = f"rank {names} of {self._world} died or stands still: no sign of life for"
        return self.publish({"text": f"{text} {PATIENCE * BEAT:g} s", "ranks": lost})

    def _beats(self) -> list[bytes]:
        keys = [f"{self._key}/beat/{rank}" for rank in range(self._world)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _live(self) -> None:
        beat, verdict = 0, f"{self._key}/verdict"
        while not self._ended.wait(BEAT if beat else 0):
            beat += 1
            try:
                self._store.set(f"{self._key}/beat/{self.rank}", str(beat))
                if self.verdict is None and self._store.check([verdict]):
                    self.verdict = json.loads(self._store.get(verdict))
            except (dist.DistError, RuntimeError):
                return


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What the store says, or None where it fails or does not say it in time."""
    found: list[Any] = []

    def run() -> None:
        with suppress(dist.DistError, RuntimeError):
            found.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


_runs = 0


def _counted() -> int:
    """Number of this run: the ranks make their runs in the same order."""
    global _runs
    _runs += 1
    return _runs


def _is_collective(error: BaseException) -> bool:
    """Whether a collective failed, and not what this rank computes."""
    if isinstance(error, dist.DistError):
        return True
    known = ("gloo", "NCCL", "c10d", "ProcessGroup", "Connection closed by peer")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in known)
