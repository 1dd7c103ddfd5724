"""A progress bar on the standard error: rich's, else tqdm's, else none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Shown(Protocol):
    """Called with the steps taken and a remark."""

    def __call__(self, step: int, note: str) -> None:
        """Show that `step` steps are done."""


@contextmanager
def bar(steps: int, wanted: bool) -> Iterator[Shown]:
    """Show a bar of `steps` steps where one is wanted, possible, and somebody looks."""
    if not wanted or not sys.stderr.isatty():
        yield lambda step, note: None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ModuleNotFoundError:
        with _tqdm(steps) as shown:
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
def _tqdm(steps: int) -> Iterator[Shown]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda step, note: None
        return
    with tqdm(total=steps) as made:

        def show(step: int, note: str) -> None:
            made.set_postfix_str(note, refresh=False)
            made.update(step - made.n)

        yield show
