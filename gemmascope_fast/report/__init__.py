"""Measurements: `python -m gemmascope_fast bench` runs, compares and reports them.

command.py      the command line
running.py      the suites of a checkout's `bench/`, a process each, into one JSON file
terminal.py     that file as a table for whoever ran it
rows.py         results as rows: pytest-benchmark's, and those of `bench/gpu_check.py`
tables.py       complete tables in Markdown, docs/benchmarks.md
readme.py       the README's choice of rows, and every target that was missed
page.py         a self-contained HTML page with charts.py's plots
comparing.py    two files of the same suites: what has become slower beyond the noise
"""

from __future__ import annotations

from collections.abc import Sequence

from .rows import OURS, OWN, verdict
from .tables import overview, summary

__all__ = ["OURS", "OWN", "main", "overview", "summary", "verdict"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with arguments `argv`; returns the exit code."""
    from .command import main as run

    return run(argv)
