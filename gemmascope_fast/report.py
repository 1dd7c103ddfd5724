"""`python -m gemmascope_fast bench --report`: the committed measurements as tables and plots.

Reads `gpu_check_<device>.json` of `bench/gpu_check.py` and `cpu*.json` of pytest-benchmark, which
`make bench-cpu` and `make bench-peers` write. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NEVER = "GPU: compile-tested and interpreted, never run on a device."
OURS = "gemmascope_fast"
OWN = "ours, "
"""How the other ways through this library are named beside `OURS`."""
COMPARED = ("encode", "topk", "decode", "backward", "step")
"""Parts whose rows compare contenders."""

Results = dict[str, Any]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; write plots and the README's part where asked."""
    parser = argparse.ArgumentParser(prog="gemmascope_fast bench", description=__doc__)
    parser.add_argument("--report", action="store_true", required=True, help="tables of results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, help="folder for plots (needs matplotlib)")
    told = "replace the part of this file between the bench markers"
    readme = CHECKOUT / "README.md"
    parser.add_argument("--update-readme", nargs="?", type=Path, const=readme, help=told)
    args = parser.parse_args(argv)
    text = tables(args.results)
    print(text)
    if args.out is not None:
        for path in plots(load(args.results), args.out):
            print(path)
    if args.update_readme is not None:
        old = args.update_readme.read_text()
        args.update_readme.write_text(replaced(old, text))
    return 0


def load(folder: Path) -> list[Results]:
    """GPU results of a folder: toy sizes and runs on a CPU are not measurements of anything."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("gpu_check_*.json"))]
    return [r for r in found if not r["quick"] and r["device"].get("type") == "cuda"]


def tables(folder: Path) -> str:
    """Markdown of everything measured: one section per GPU, then the CPU."""
    gpus = [gpu_section(results) for results in load(folder)]
    cpus = [cpu_section(json.loads(p.read_text())) for p in sorted(folder.glob("cpu*.json"))]
    return "\n\n".join([*(gpus or [NEVER]), *cpus])


def replaced(text: str, part: str) -> str:
    """`text` with what lies between the markers replaced.

    Raises:
        ValueError: the markers are missing, repeated or in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


# ---- tables


def gpu_section(results: Results, every: bool = False) -> str:
    """One GPU's table: rows of the default L0, or `every` one."""
    chosen = [r for p in COMPARED for r in rows(results, p) if every or is_default(r, results)]
    table = markdown(HEAD, [cells(row) for row in chosen])
    training = [f"- {r['name']}: {r['line']}" for r in rows(results, "train_1m")]
    text = f"{machine(results)}\n\n{table}" if chosen else machine(results)
    return text + ("\n\nTraining, 1M latents:\n\n" + "\n".join(training) if training else "")


HEAD = [
    *("op", "latents", "L0", "firing", "time", "rate", "of the floor", "against", "memory"),
    "target",
]


def cells(row: Row) -> list[str]:
    """A compared row as text."""
    shape = row["shape"]
    op = row["name"].split()[0] if row["part"] == "topk" else row["part"]
    return [op, f"{shape['d_sae']:,}", str(shape["l0"]), shape["firing"], *measured(row)]


def measured(row: Row) -> list[str]:
    """What was found, in the columns after the shape."""
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


def cpu_section(results: Results) -> str:
    """Table of one file of pytest-benchmark's, one row per case."""
    m, commit = results["machine_info"], results["commit_info"]
    commit = commit["id"][:7] + (" and changes" if commit["dirty"] else "")
    where = f"{m['processor']}, {m['threads']} threads, {m['instructions']}, torch {m['torch']}"
    title = f"CPU: {where}, commit {commit}. Medians; the floor is measured in the same run."
    head = ("op", "n", "d", "latents", "inputs", *HEAD[4:])
    sizes = ("n", "d", "d_sae")
    body = [
        [r["op"], *(f"{r['shape'][k]:,}" for k in sizes), r["shape"]["inputs"], *measured(r)]
        for r in cpu_rows(results)
    ]
    return f"{title}\n\n{markdown(head, body)}"


def cpu_rows(results: Results) -> list[Row]:
    """The contenders of each case as one row of the form that a GPU's have."""
    found: dict[str, Row] = {}
    for one in results["benchmarks"]:
        told = one["extra_info"]
        row = found.setdefault(one["group"], {"times": {}})
        row["times"][told["contender"]] = {"median_s": one["stats"]["median"], **told}
        if told["contender"] == OURS:
            row |= told
    return [row for row in found.values() if OURS in row["times"]]


def markdown(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in ls)} |" for ls in lines)


# ---- one run in full


def summary(results: Results) -> str:
    """Everything a run of `gpu_check.py` found, as Markdown."""
    parts = [f"# GPU check\n\n{overview(results)}", gpu_section(results, every=True)]
    for part in dict.fromkeys(r["part"] for r in results["rows"].values()):
        if part not in COMPARED:
            body = [[r["name"], r["status"], first(r)] for r in rows(results, part, every=True)]
            parts.append(f"## {part}\n\n{markdown(('row', 'status', 'found'), body)}")
    troubles = [r for r in results["rows"].values() if r["status"] == "failed"]
    parts += [f"## Failed: {r['part']}, {r['name']}\n\n```\n{r['reason']}\n```" for r in troubles]
    return "\n\n".join(parts) + "\n"


def overview(results: Results) -> str:
    """Status of each part, counts of its rows, and the verdicts on the targets."""
    body = []
    for part, entry in results["parts"].items():
        counts: dict[str, int] = {}
        for row in rows(results, part, every=True):
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        told = ", ".join(f"{n} {status}" for status, n in counts.items())
        body.append([part, entry["status"], told, f"{entry['seconds']:.0f} s", entry["reason"]])
    found = [v for r in results["rows"].values() for v in r.get("targets", [])]
    met = [v["met"] for v in found if v["met"] is not None]
    table = markdown(("part", "status", "rows", "took", "why"), body)
    told = f"Targets: {sum(met)} of {len(met)} met, {len(found) - len(met)} not measured."
    open_ = "".join(f"\n- {text}" for text in results.get("unmeasured", ()))
    return f"{table}\n\n{told}" + (f" Also open:\n{open_}" if open_ else "")


def machine(results: Results) -> str:
    """Device, clocks, versions and commit in one sentence."""
    device = results["device"]
    versions = results["rows"].get("environment/versions", {}).get("versions", {})
    commits = sorted({r["commit"] for r in results["rows"].values() if "commit" in r})
    known = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    clocks = {c.get("clocks.sm", "") for c in results.get("clocks", {}).values()} - {""}
    words = [device.get("name", "unknown device"), *known]
    words += [f"SM clock {', '.join(sorted(clocks))}"] if clocks else []
    words += [f"commit {', '.join(commits)}"] if commits else []
    sizes = {(r["shape"]["n"], r["shape"]["d"]) for p in COMPARED for r in rows(results, p)}
    words += [f"n = {n}, d = {d}" for n, d in sorted(sizes)]
    kind = "GPU" if device.get("type") == "cuda" else "Rehearsal, not on a GPU"
    return (
        f"{kind}: {', '.join(words)}. Medians; bf16 weights; the floor is measured in the same run."
    )


def rows(results: Results, part: str, every: bool = False) -> list[Row]:
    """Rows of a part that are done, or `every` one."""
    mine = [r for r in results["rows"].values() if r["part"] == part]
    return [r for r in mine if every or r["status"] == "done"]


def is_default(row: Row, results: Results) -> bool:
    """Whether a row has the L0 that was measured first: 64, but for toy sizes."""
    known = {r["shape"]["l0"] for part in COMPARED for r in rows(results, part)}
    return bool(row["shape"]["l0"] == (64 if 64 in known else min(known)))


def first(row: Row) -> str:
    """First line of what a row says."""
    told = str(row.get("line") or row.get("reason") or "").splitlines()
    return told[0] if told else ""


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def mebibytes(count: int | None) -> str:
    """Extra memory of a call; empty where it is not known."""
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


# ---- plots


def plots(found: Sequence[Results], out: Path) -> list[Path]:
    """Speed and memory over the number of latents, one SVG each per GPU; paths that were written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for results in found:
        slug = "_".join(results["device"]["name"].lower().split())
        for quantity, label in (("median_s", "seconds"), ("peak_extra_bytes", "bytes")):
            shown = [p for p in COMPARED if rows(results, p)]
            if not shown:
                continue
            figure = Figure(figsize=(4 * len(shown), 3.6), layout="constrained")
            panels = figure.subplots(1, len(shown), squeeze=False)[0]
            for axes, part in zip(panels, shown, strict=True):
                for name, points in series(results, part, quantity).items():
                    axes.plot(*zip(*points, strict=True), marker="o", label=name)
                axes.set(xscale="log", yscale="log", title=part, xlabel="latents", ylabel=label)
                axes.legend(fontsize=7)
            written.append(out / f"{slug}_{'speed' if quantity == 'median_s' else 'memory'}.svg")
            figure.savefig(written[-1])
    return written


def series(results: Results, part: str, quantity: str) -> dict[str, list[tuple[int, float]]]:
    """Per contender, `(latents, quantity)` over the rows of default L0 and uniform firing."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows(results, part):
        if row["shape"]["firing"] != "uniform" or not is_default(row, results):
            continue
        for name, taken in row["times"].items():
            if taken.get(quantity):
                found.setdefault(name, []).append((row["shape"]["d_sae"], taken[quantity]))
    return {name: sorted(points) for name, points in found.items()}
