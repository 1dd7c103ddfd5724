"""What a part is given: sizes, the device, the file of results, and the time that is left."""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .state import Results

ROOT = Path(__file__).resolve().parents[2]
FIRINGS = ("uniform", "log-normal")
COMMIT = "GPU_CHECK_COMMIT"


class Skip(Exception):
    """This machine lacks what a row needs; the message says what."""


class Fatal(Exception):
    """The device no longer answers: no later row of this process can be trusted."""


@dataclass(frozen=True)
class Shape:
    """One problem: n tokens of width d, d_sae latents, mean active latents, who fires how often."""

    n: int
    d: int
    d_sae: int
    l0: int
    firing: str = "uniform"

    @property
    def name(self) -> str:
        return f"F={self.d_sae} L0={self.l0} {self.firing}"

    def json(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("n", "d", "d_sae", "l0", "firing")}


@dataclass(frozen=True)
class Settings:
    """Sizes of a run: Gemma 3 27B's, or toy ones that execute every line in seconds."""

    device: str = "cuda"
    quick: bool = False
    only_latents: tuple[int, ...] = ()
    only_l0s: tuple[int, ...] = ()
    brief: bool = False

    @property
    def n(self) -> int:
        return 64 if self.quick else 8192

    @property
    def d(self) -> int:
        return 64 if self.quick else 5376

    @property
    def latents(self) -> tuple[int, ...]:
        return self.only_latents or ((512, 2048) if self.quick else (2**14, 2**16, 2**18, 2**20))

    @property
    def l0s(self) -> tuple[int, ...]:
        """The default first: it is what the targets speak of, and time may end early."""
        return self.only_l0s or ((8,) if self.quick else (64, 16, 128))

    @property
    def steps(self) -> int:
        """Length of the training run."""
        return 4 if self.quick else 50

    @property
    def row_seconds(self) -> float:
        """Time for the repetitions of one row."""
        return 0.05 if self.quick else 0.8 if self.brief else 2.5

    def shapes(self, firings: tuple[str, ...] = FIRINGS) -> Iterator[Shape]:
        for l0 in self.l0s:
            for d_sae in self.latents:
                for firing in firings:
                    yield Shape(self.n, self.d, d_sae, l0, firing)


class Context:
    """One part at work."""

    def __init__(self, part: str, settings: Settings, results: Results, limit_s: float) -> None:
        self.part, self.settings, self.results = part, settings, results
        self.deadline = time.monotonic() + limit_s

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def row(
        self,
        name: str,
        measure: Callable[[], dict[str, Any]],
        estimate_s: float = 0.0,
        **about: Any,
    ) -> None:
        """Measure one row unless it is settled or too long for the time that is left.

        Args:
            name: of the row inside its part.
            measure: returns what to store; raises `Skip`, `Fatal`, or anything: a failure.
            estimate_s: expected seconds.
            about: stored with the row whatever comes (its shape, say).
        """
        if self.results.settled(self.part, name):
            return
        if estimate_s > self.remaining():
            reason = f"about {estimate_s:.0f} s needed, {max(self.remaining(), 0):.0f} s left"
            self._put(name, "postponed", reason=reason, **about)
            return
        self.results.begin(self.part, name)
        began = time.monotonic()
        try:
            found = {**about, **measure()}
            status = found.pop("status", "done")
        except Skip as skip:
            status, found = "skipped", {**about, "reason": str(skip)}
        except Exception as error:
            status, found = "failed", {**about, "reason": _told(error)}
            if isinstance(error, Fatal):
                self._put(name, status, **found)
                raise
        self._put(name, status, **found, wall_s=time.monotonic() - began, commit=commit())

    def _put(self, name: str, status: str, **found: Any) -> None:
        self.results.put(self.part, name, status, **found)
        told = found.get("line") or found.get("reason", "")
        print(f"{self.part:<11} {name:<28} {status:<9} {told.splitlines()[0] if told else ''}")


def _told(error: Exception) -> str:
    """One line that says what went wrong, then where."""
    lines = str(error).strip().splitlines() or ["no message"]
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return "\n".join([f"{type(error).__name__}: {lines[0][:300]}", *lines[1:20], where])


def commit() -> str:
    """State of the checkout, or why it is not known; `--commit` tells it of a copy without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return os.environ.get(COMMIT) or output(command) or "unknown (no git repository here)"


def output(command: list[str], timeout_s: float = 20) -> str:
    """What a command prints, stripped; empty when it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
