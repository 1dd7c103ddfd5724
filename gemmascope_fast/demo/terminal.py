"""Progress bars and tables in the terminal (rich, imported when first used)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .activations import Progress

LATENTS_SHOWN = 20


@contextmanager
def track(console: Any, label: str) -> Iterator[Progress]:
    """Show a progress bar; yields a callback that takes (done, total, note)."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<36}"),
        bars.BarColumn(),
        bars.TextColumn("{task.percentage:>3.0f} %"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    with bars.Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update


def print_table(console: Any, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Print rows whose first cell is a name and whose other cells belong to `columns`."""
    from rich.table import Table

    made = Table(header_style="bold")
    made.add_column("", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*row)
    console.print(made)
