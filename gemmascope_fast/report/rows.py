"""Results of both kinds as rows of one form, and their cells as text.

A row has `op`, `shape`, `times` (per contender: `median_s`, `peak_extra_bytes`), `ratios` (how many
times as fast as each contender), `of_floor`, `tflops` or `gb_per_s`, `targets`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "bench" / "results"
OURS = "gemmascope_fast"
OWN = "ours, "
"""How the other ways through this library are named beside `OURS`."""
COMPARED = ("encode", "topk", "decode", "backward", "step", "momentum", "sparsify")
"""Parts of a GPU's results whose rows compare contenders."""
STEP_BETA1 = "step, beta1 = 0.9"

Results = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Results by file name, of GPUs and of CPUs."""

    gpu: dict[str, Results] = field(default_factory=dict)
    cpu: dict[str, Results] = field(default_factory=dict)


# ---- reading


def read(paths: Iterable[Path]) -> Found:
    """Results of files and folders.

    Raises:
        OSError: one is not there.
        ValueError: a file holds no results.
    """
    found = Found()
    for path in paths:
        if path.is_dir():
            found.gpu.update(load(path))
            found.cpu.update({p.name: benchmarks(p) for p in sorted(path.glob("cpu*.json"))})
        else:
            found.cpu[path.name] = benchmarks(path)
    return found


def load(folder: Path) -> dict[str, Results]:
    """GPU results of a folder, by file; toy sizes and runs on a CPU are no measurements."""
    found = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("gpu_check_*.json"))}
    return {
        name: results
        for name, results in found.items()
        if not results["quick"] and results["device"].get("type") == "cuda"
    }


def benchmarks(path: Path) -> Results:
    """One file of pytest-benchmark's.

    Raises:
        ValueError: it is not one, or holds nothing that this library's suites measured.
    """
    try:
        results: Results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"bench: {path} is not JSON: {error}") from error
    if not isinstance(results, dict) or not results.get("benchmarks"):
        raise ValueError(f"bench: {path} holds no measurements of `gemmascope_fast bench`")
    if not all("contender" in one["extra_info"] for one in results["benchmarks"]):
        raise ValueError(f"bench: {path} has benchmarks that are not of this library's suites")
    return results


def cpu_rows(results: Results) -> list[Row]:
    """The contenders of each case as one row."""
    found: dict[str, Row] = {}
    for one in results["benchmarks"]:
        told = one["extra_info"]
        row = found.setdefault(one["group"], {"group": one["group"], "times": {}})
        seconds = {"median_s": one["stats"]["median"], "rounds_s": one["stats"].get("data", [])}
        row["times"][told["contender"]] = {**seconds, **told}
        if told["contender"] == OURS:
            row |= told
    return [row for row in found.values() if OURS in row["times"]]


def gpu_rows(results: Results, every: bool = False) -> list[Row]:
    """The compared rows of one GPU: those of the default L0, or `every` one."""
    return [
        {**row, "op": op_of(part, row)}
        for part in COMPARED
        for row in rows(results, part)
        if every or is_default(row, results)
    ]


def op_of(part: str, row: Row) -> str:
    """What a row of a part is of: some parts have several kinds, named first."""
    kind = str(row["name"]).split()[0]
    return {"topk": kind, "sparsify": f"{kind} beside sparsify", "momentum": STEP_BETA1}.get(
        part, part
    )


def rows(results: Results, part: str, every: bool = False) -> list[Row]:
    """Rows of a part of a GPU's results that are done, or `every` one."""
    mine = [r for r in results["rows"].values() if r["part"] == part]
    return [r for r in mine if every or r["status"] == "done"]


def is_default(row: Row, results: Results) -> bool:
    """Whether a row has the L0 that was measured first: 64, but for toy sizes."""
    known = {r["shape"]["l0"] for part in COMPARED for r in rows(results, part)}
    return bool(row["shape"]["l0"] == (64 if 64 in known else min(known)))


def peers(row: Row) -> Iterator[str]:
    """Contenders that are not ours and were timed."""
    for name, taken in row["times"].items():
        if name != OURS and not name.startswith(OWN) and "median_s" in taken:
            yield name


# ---- cells


def measured(row: Row) -> list[str]:
    """Time, rate, share of the floor, contenders, memory and verdicts."""
    ours, flops, moved = row["times"][OURS], row["tflops"] or 0, row["gb_per_s"]
    rate = f"{flops:.0f} TFLOP/s" if flops >= 1 else f"{1e3 * flops:.0f} GFLOP/s"
    return [
        "; ".join([milliseconds(ours["median_s"]), *variants(row)]),
        rate if flops else f"{moved:.0f} GB/s" if moved else "",
        f"{100 * row['of_floor']:.0f} %" if row["of_floor"] else "",
        against(row),
        mebibytes(ours["peak_extra_bytes"]),
        ", ".join(told for v in row["targets"] if (told := verdict(v))),
    ]


def variants(row: Row) -> list[str]:
    """Times of other ways through this library."""
    return [
        f"{name.removeprefix(OWN)} {milliseconds(taken['median_s'])}"
        for name, taken in row["times"].items()
        if name.startswith(OWN) and "median_s" in taken
    ]


def against(row: Row) -> str:
    """How many times as fast as each contender, or why one could not take part."""
    words = []
    for name, taken in row["times"].items():
        if name.startswith(OWN):
            continue
        if name in row["ratios"]:
            words.append(f"{row['ratios'][name]:.2f}x {name}")
        elif "unavailable" in taken:
            words.append(f"{name}: {taken['unavailable'].split(':')[0]}")
    return ", ".join(words)


def verdict(target: dict[str, Any]) -> str:
    """`met` or `missed`, with the goal and what was found; empty when it was not measured."""
    if target["met"] is None:
        return ""
    sign = "<=" if target["at_most"] else ">="
    told = "met" if target["met"] else "**missed**"
    return f"{told}: {target['found']:.3g} {sign} {target['goal']:g} {target['text']}"


def inputs(row: Row) -> str:
    """What a row's inputs are, with the latents that they touch."""
    told = str(row["shape"].get("inputs") or row["shape"]["firing"])
    touched = row.get("facts", {}).get("touched")
    return told if touched is None or "touched" in told else f"{told}, {touched:,.0f} touched"


def machine_of(results: Results) -> str:
    """Processor, threads, instructions and torch of a CPU's results."""
    m = results["machine_info"]
    return f"{m['processor']}, {m['threads']} threads, {m['instructions']}, torch {m['torch']}"


def commit_of(results: Results) -> str:
    """The commit that a CPU's results were measured at."""
    commit = results["commit_info"]
    return f"commit {commit['id'][:7]}" + (" and changes" if commit["dirty"] else "")


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def mebibytes(count: int | None) -> str:
    """Extra memory of a call; empty where it is not known."""
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def markdown(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in ls)} |" for ls in lines)
