"""Two training processes that take turns, so that neither disturbs the other's timing.

While one trains the other waits for a line on its standard input. Turns go A B, B A, A B, ...: on a
machine that gets slower or faster during the run both see the same machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class History:
    """What a run reported: per step, per turn, and at the end.

    Attributes:
        steps: loss, fvu, l0 (of the batch) and seconds of every step.
        held_out: step, fvu and l0 after every turn.
        peak_bytes: largest resident memory above the one before training; None if unknown.
        final: fvu, l0 (held out) and counts (`[d_sae]`, over all tokens).
        threads: torch's threads.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None
    final: dict[str, Any] = field(default_factory=dict)
    threads: int = 0

    def add(self, turn: dict[str, Any]) -> None:
        """Append one turn's answer."""
        self.steps += turn["steps"]
        self.held_out.append(turn["held_out"])
        self.peak_bytes = turn["peak_bytes"]

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(step["seconds"] for step in self.steps)

    @property
    def elapsed(self) -> list[float]:
        """Seconds of training after each step; the other run's turns do not count."""
        total, marks = 0.0, []
        for step in self.steps:
            total += step["seconds"]
            marks.append(total)
        return marks


class Worker:
    """A `gemmascope_fast.demo.worker` process."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        command = [sys.executable, "-m", "gemmascope_fast.demo.worker", kind, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            RuntimeError: the process ended; its own message is on the standard error.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"demo: the {self.kind} run ended early (exit code {code})")
        return dict(json.loads(line))

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def schedule(kinds: Sequence[str], steps: int, turn: int) -> Iterator[tuple[str, int]]:
    """Yield (run, steps) of every turn: the order is reversed from one round to the next."""
    for number, start in enumerate(range(0, steps, turn)):
        for kind in kinds if number % 2 == 0 else tuple(reversed(kinds)):
            yield kind, min(turn, steps - start)


def train_in_turns(
    kinds: Sequence[str],
    folder: Path,
    steps: int,
    turn: int,
    report: Callable[[str, History], None],
) -> dict[str, History]:
    """Train every run of `kinds` for `steps` steps; `report` is called after each turn."""
    workers = {kind: Worker(kind, folder) for kind in kinds}
    histories = {kind: History() for kind in kinds}
    try:
        for kind, worker in workers.items():
            histories[kind].threads = worker.answer()["threads"]
        for kind, count in schedule(kinds, steps, turn):
            histories[kind].add(workers[kind].ask(do="train", steps=count))
            report(kind, histories[kind])
        for kind, worker in workers.items():
            histories[kind].final = worker.ask(do="finish")
            report(kind, histories[kind])
    finally:
        for worker in workers.values():
            worker.close()
    return histories
