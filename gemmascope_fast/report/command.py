"""Measure this machine, report what was measured, and compare two runs.

bench --quick                       a table of this machine in about two minutes
bench [encode decode backward step layers small] [--shapes named] [-k topk]
bench --sweep --report out/         curves over d_sae and L0, and a page with plots
bench --against compile,saelens     other contenders beside dense PyTorch; saelens and sparsify from
                                    here or .venv-peers (make .venv-peers/.installed)
bench --results [FILE ...]          measure nothing, show these results; default: the committed
bench --compare A.json B.json       what became slower beyond the noise; exit status 1 if any
bench --update-readme               committed results into README.md and docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from . import readme, running
from .rows import CHECKOUT, RESULTS, Found, Results, read
from .tables import tables


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="gemmascope_fast bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    told = f"of {', '.join((*running.SUITES, running.SAELENS))}; default: all but the last"
    made.add_argument("suites", nargs="*", help=told)
    sizes = made.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="few cases, about two minutes")
    sizes.add_argument("--sweep", action="store_true", help="curves over d_sae and L0, 5 minutes")
    sizes.add_argument("--shapes", choices=("toy", "small", "named"), help="default: small")
    made.add_argument("-k", dest="matching", default="", help="only cases that match, as in pytest")
    told = (
        f"contenders of compile (torch.compile'd dense PyTorch), {', '.join(running.PEERS)} "
        "(their own training steps)"
    )
    made.add_argument("--against", default="", metavar="A,B", help=told)
    made.add_argument("--rounds", type=int, default=5, help="fewest rounds of a case (default: 5)")
    made.add_argument("--out", type=Path, help="result file; default bench/results/run_<time>.json")
    told = "write FOLDER/report.html (default: bench-report)"
    default = Path("bench-report")
    made.add_argument("--report", nargs="?", type=Path, const=default, metavar="FOLDER", help=told)
    told = "measure nothing; files or folders of results"
    made.add_argument("--results", nargs="*", type=Path, metavar="PATH", help=told)
    told = "measure nothing; flag what became slower from A to B"
    made.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help=told)
    told = "measure nothing; rewrite the tables of README.md and docs/benchmarks.md"
    page = CHECKOUT / "README.md"
    made.add_argument(
        "--update-readme", nargs="?", type=Path, const=page, metavar="FILE", help=told
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 for a regression or a suite that failed, 2 for what cannot be used."""
    made = parser()
    args = made.parse_args(argv)
    known = (*running.SUITES, running.SAELENS)
    if wrong := [name for name in args.suites if name not in known]:
        made.error(f"no suite {wrong[0]!r}: choose from {', '.join(known)}")
    against = [name for name in args.against.split(",") if name]
    if wrong := [name for name in against if name not in ("compile", *running.PEERS)]:
        made.error(f"--against: {wrong[0]!r} is none of compile, {', '.join(running.PEERS)}")
    if args.sweep and args.suites:
        made.error("--sweep is a suite of its own: leave out the others")
    if args.rounds < 1:
        made.error(f"--rounds must be at least 1, got {args.rounds}")
    try:
        if args.compare is not None:
            from .comparing import main as compare

            return compare(*args.compare)
        if args.results is not None or args.update_readme is not None:
            return show(args)
        return measure(args, against, list(sys.argv[1:] if argv is None else argv))
    except running.Failed as error:
        print(error, file=sys.stderr)
        return 1
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def measure(args: argparse.Namespace, against: Sequence[str], argv: Sequence[str]) -> int:
    """Run the suites, keep the results, show them."""
    if told := running.missing():
        print(told, file=sys.stderr)
        return 2
    from rich.console import Console

    from . import terminal

    if args.out is not None and args.out.is_dir():
        raise IsADirectoryError(f"bench: --out must be a file, got the folder {args.out}")
    console = Console()
    chosen = args.suites or ([running.SWEEP] if args.sweep else list(running.SUITES))
    if running.SAELENS in against and running.SAELENS not in chosen:
        chosen = [*chosen, running.SAELENS]
    shapes = "sweep" if args.sweep else "quick" if args.quick else args.shapes or "small"
    command = shlex.join(["python", "-m", "gemmascope_fast", "bench", *argv])
    plan = running.Plan(chosen, shapes, args.matching, against, args.rounds, command)
    if args.report is not None:
        from . import page  # before an hour of measuring: it needs matplotlib

        page.check()
    if told := terminal.busy():
        console.print(f"[bold]{told}[/]", highlight=False)
    with terminal.progress(console, verbose=not args.quick) as say:
        results, failures = running.run(plan, say)
    file = args.out or RESULTS / f"run_{datetime.now():%Y%m%d-%H%M%S}.json"
    write(file, results)
    terminal.print_results(console, results)
    console.print(f"Results: {file}", soft_wrap=True)
    if args.report is not None:
        written = page.write(args.report, Found(cpu={file.name: results}))
        console.print(f"Report: {written}", soft_wrap=True)
    for told in failures:
        print(f"\n{told}", file=sys.stderr)
    return 1 if failures else 0


def show(args: argparse.Namespace) -> int:
    """Tables of results that are there, and what else was asked for."""
    found = read(args.results or [RESULTS])
    print(tables(found))
    if args.report is not None:
        from . import page

        page.check()
        print(page.write(args.report, found))
    if args.update_readme is not None:
        for path in readme.update(args.update_readme, found):
            print(path)
    return 0


def write(file: Path, results: Results) -> None:
    """Write JSON under another name, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)
