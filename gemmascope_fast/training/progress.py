"""Progress on the standard error: rich's bar, else tqdm's; without them or a terminal, lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

SECONDS, SHARE = 10.0, 1 / 20
"""Between two lines: at least so long, and so much of the time since the first."""


class Shown(Protocol):
    """Called with the steps taken and a remark."""

    def __call__(self, step: int, note: str) -> None:
        """Show that `step` steps are done."""


@contextmanager
def bar(
    steps: int, wanted: bool, tokens: int = 1, name: str = "train: step", done: int = 0
) -> Iterator[Shown]:
    """Show the progress of `steps` steps of `tokens` tokens, `done` before, if that is wanted."""
    if not wanted:
        yield lambda step, note: None
        return
    if done:
        print(f"train: goes on from step {done:,}, a checkpoint", file=sys.stderr)
    if not sys.stderr.isatty():
        yield _lines(steps, tokens, name)
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ModuleNotFoundError:
        with _tqdm(steps, tokens, name) as shown:
            yield shown
        return
    columns = (
        *(bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn()),
        bars.TextColumn("{task.fields[note]}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=steps, note="")
        yield lambda step, note: progress.update(task, completed=step, note=note)


@contextmanager
def _tqdm(steps: int, tokens: int, name: str) -> Iterator[Shown]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield _lines(steps, tokens, name)
        return
    with tqdm(total=steps) as made:

        def show(step: int, note: str) -> None:
            made.set_postfix_str(note, refresh=False)
            made.update(step - made.n)

        yield show


def _lines(steps: int, tokens: int, name: str) -> Shown:
    """A line now and then, and one at the end."""
    first: tuple[int, float] | None = None
    last = time.monotonic()

    def show(step: int, note: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (step, now)
        done, passed = step - first[0], now - first[1]
        if step < steps and now - last < max(SECONDS, SHARE * passed):
            return
        last = now
        if done > 0 and passed > 0:
            note += f", {done * tokens / passed:,.0f} tokens/s"
            left = timedelta(seconds=round((steps - step) * passed / done))
            note += f", {left} left" if step < steps else ""
        print(f"{name} {step:,} of {steps:,}: {note}", file=sys.stderr, flush=True)

    return show
