"""A run for whoever started it: progress, then a table that says which row is theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import gemma
from .rows import (
    OURS,
    Results,
    Row,
    commit_of,
    cpu_rows,
    inputs,
    machine_of,
    mebibytes,
    milliseconds,
    peers,
)

TITLES = {
    "jumprelu_encode": "encode, JumpReLU",
    "topk_encode": "encode, TopK",
    "batchtopk_encode": "encode, BatchTopK",
    "decode": "decode",
    "forward": "encode + decode",
    "training": "loss + gradients",
    "step": "training step",
    "clt": "training step, CLT",
    "crosscoder": "training step, crosscoder",
}
LEGEND = (
    ("what", "encode: activations to active latents; decode: back; training step: with Adam"),
    ("Gemma 3", "models whose activations are this wide, d; {places}"),
    ("n", "tokens in one call"),
    ("latents", "width of the dictionary, d_sae; in brackets the active ones per token, L0"),
    ("time", "median of one call of gemmascope-fast"),
    ("faster", "dense PyTorch's time over ours: same inputs, same results, float32 unless named"),
    ("memory", "what the call adds at most; dense PyTorch's beside it"),
    ("of limit", "share of what this machine could do at best, by ceilings measured in between"),
)
YOURS = (
    "Your row: what you do, at the width of your activations and the nearest number of latents. "
    "An encoder's time grows with n x d x latents, that of decoding and gradients with n x d x L0."
)


@contextmanager
def progress(console: Any, verbose: bool) -> Iterator[Callable[[str, int, str], None]]:
    """A bar per suite; yields what `running.run` tells its lines to.

    It is redrawn when a case ends and not in between, so as not to disturb what is timed.
    """
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.fields[suite]:<10}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[case]}"),
    )
    with bars.Progress(*columns, console=console, auto_refresh=False) as shown:
        tasks: dict[str, Any] = {}
        ended: dict[str, int] = {}

        def say(suite: str, cases: int, line: str) -> None:
            if suite not in tasks:
                tasks[suite] = shown.add_task("", total=None, suite=suite, case="")
                ended[suite] = 0
            if line.startswith("== "):
                ended[suite] += 1
                shown.update(tasks[suite], case=line[3:])
            elif not line.startswith("cases: "):
                if verbose and line.strip(". []0123456789%"):
                    shown.console.print(line, highlight=False, markup=False, soft_wrap=True)
                return
            shown.update(tasks[suite], completed=ended[suite], total=cases or None)
            shown.refresh()

        yield say


def busy() -> str:
    """A warning where other processes keep the processors busy; empty where they do not."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load < processors / 2:
        return ""
    return (
        f"Other processes keep this machine busy (load {load:.1f} on {processors} processors): "
        "times will be too long, ratios less certain."
    )


def print_results(console: Any, results: Results) -> None:
    """The table, what its columns mean, and whose machine this is."""
    from rich.box import SIMPLE
    from rich.table import Table

    rows = sorted(cpu_rows(results), key=place)
    titles = ("what", "Gemma 3", "n", "latents", "time", "faster", "memory,\nMiB", "of\nlimit")
    title = f"{machine_of(results)}, {commit_of(results)}"
    table = Table(header_style="bold", title=title, box=SIMPLE, show_edge=False, padding=0)
    table.add_column(titles[0], overflow="fold")  # in 80 columns only this one need wrap
    for column, title in enumerate(titles[1:]):
        table.add_column(title, justify="right" if column else "left", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before["op"] != row["op"]:
            table.add_section()
        table.add_row(*cells(row))
    console.print(table)
    for host, found in results.get("integrations", {}).items():
        for feature, one in found["rows"].items():
            stock, backend = (one[name]["median_ms"] for name in ("stock", "backend"))
            told = f"  {host}, {feature}: {stock:,.0f} ms, on this backend {backend:,.0f} ms"
            console.print(f"{told} ({stock / backend:.1f}x)", highlight=False)
    known = gemma.places(row["shape"]["d"] for row in rows)
    for title, text in LEGEND:
        console.print(f"  [bold]{title:9}[/]{text.format(places=known)}", highlight=False)
    console.print(YOURS, highlight=False)


def place(row: Row) -> tuple[int, str, int, int]:
    """Where a row stands: by op, then by width."""
    known = list(TITLES)
    rank = known.index(row["op"]) if row["op"] in known else len(known)
    return rank, row["op"], row["shape"]["d"], row["shape"]["d_sae"]


def cells(row: Row) -> list[str]:
    """A row in the table's columns; a contender that is missing leaves its cells empty."""
    shape, ours = row["shape"], row["times"][OURS]
    contender = next((name for name in peers(row) if name.startswith("dense")), None)
    theirs = row["times"][contender] if contender else None
    model, words = gemma.model(shape["d"]), inputs(row).split(", ")
    extra = [w for w in words if w in ("trace", "log-normal", "uniform", "bf16", "training")]
    return [
        ", ".join([str(TITLES.get(row["op"], row["op"])), *extra]),
        f"{model} (d {shape['d']:,})" if model else f"d {shape['d']:,}",
        f"{shape['n']:,}",
        f"{shape['d_sae']:,} ({shape['l0']:.0f})",
        milliseconds(ours["median_s"]),
        f"{theirs['median_s'] / ours['median_s']:.1f}x" if theirs else "",
        " / ".join(mebibytes(t["peak_extra_bytes"])[: -len(" MiB")] for t in (ours, theirs) if t),
        f"{100 * row['of_floor']:.0f} %" if row["of_floor"] else "",
    ]
