"""Complete tables in Markdown, of every committed result and of one run of `gpu_check.py`."""

from __future__ import annotations

from typing import Any

from . import charts
from .rows import (
    COMPARED,
    Found,
    Results,
    Row,
    commit_of,
    cpu_rows,
    gpu_rows,
    inputs,
    machine_of,
    markdown,
    measured,
    rows,
)

NEVER = "GPU: compile-tested and interpreted, never run on a device."
GPU_COMMAND = "make gpu-check"
HEAD = [
    *("op", "latents", "L0", "firing", "time", "rate", "of the floor", "against", "memory"),
    "target",
]
INTRODUCTION = """# Benchmarks

Every committed measurement, written by `python -m gemmascope_fast bench --update-readme` from the
files that each table names; the README shows a part of it. Times are medians of interleaved rounds.
"Of the floor" is the share of what the same machine could do at best, by ceilings measured between
those rounds. "Against" says how many times as fast as each contender. Memory is what a call adds at
most. Inputs of sparse passes: latents drawn uniformly, by log-normal rates (sigma = 2 nats), or
recorded from the dictionary that `make demo` trains (`trace`: 8,192 latents, shuffled tokens)."""


def document(found: Found) -> str:
    """`docs/benchmarks.md`."""
    shown = [f"![{title}]({name})" for name, (title, _, _) in pictures(found).items()]
    return "\n\n".join([INTRODUCTION, *shown, tables(found)]) + "\n"


def pictures(found: Found) -> dict[str, tuple[str, list[Row], str]]:
    """The document's curves by file name: title, rows, and over which size they go."""
    steps = [r for results in found.cpu.values() for r in cpu_rows(results) if r["op"] == "step"]
    held = {over: charts.curves(steps, over) for over in ("d_sae", "l0")}
    return {
        f"benchmarks-step-{over}.svg": (title, rows, over)
        for over, drawn in held.items()
        for title, rows in list(drawn.items())[:1]
    }


def tables(found: Found) -> str:
    """Markdown of everything measured: one section per GPU, then one per file of a CPU."""
    gpus = [gpu_section(results, source=name) for name, results in found.gpu.items()]
    cpus = [cpu_section(results, source=name) for name, results in found.cpu.items()]
    return "\n\n".join([*(gpus or [NEVER]), *cpus])


def origin(name: str, command: str, to: str = "../") -> str:
    """Where a table is from, with a link; `to` leads from the page to the checkout."""
    return f"From [{name}]({to}bench/results/{name}), by `{command}`."


def gpu_section(results: Results, every: bool = False, source: str = "") -> str:
    """One GPU's table: rows of the default L0, or `every` one."""
    chosen = gpu_rows(results, every)
    table = markdown(HEAD, [cells(row) for row in chosen])
    training = [f"- {r['name']}: {r['line']}" for r in rows(results, "train_1m")]
    told = machine(results) + (f" {origin(source, GPU_COMMAND)}" if source else "")
    told += f"\n\n{results['about']}" if "about" in results else ""
    text = f"{told}\n\n{table}" if chosen else told
    return text + ("\n\nTraining, 1M latents:\n\n" + "\n".join(training) if training else "")


def cells(row: Row) -> list[str]:
    """A compared row of a GPU as text."""
    shape = row["shape"]
    return [row["op"], f"{shape['d_sae']:,}", str(shape["l0"]), shape["firing"], *measured(row)]


def cpu_section(results: Results, source: str = "") -> str:
    """Table of one file of pytest-benchmark's, one row per case."""
    told = f"CPU: {machine_of(results)}, {commit_of(results)}."
    told += " Medians; the floor is measured in the same run."
    if source:
        told += f" {origin(source, results.get('command', 'make bench-cpu'))}"
    head = ("op", "n", "d", "latents", "L0", "inputs", *HEAD[4:])
    body = [[*cpu_shape(row), *measured(row)] for row in cpu_rows(results)]
    return f"{told}\n\n{markdown(head, body)}"


def cpu_shape(row: Row) -> list[str]:
    """Op, sizes and inputs of a CPU's row."""
    sizes = [f"{row['shape'][k]:,}" for k in ("n", "d", "d_sae")]
    return [row["op"], *sizes, f"{row['shape']['l0']:.4g}", inputs(row)]


# ---- one run of gpu_check.py in full


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
    """Device, clocks, versions and commit of a GPU's results in one sentence."""
    device = results["device"]
    versions = results["rows"].get("environment/versions", {}).get("versions", {})
    commits = sorted({r["commit"] for r in results["rows"].values() if "commit" in r})
    known = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    words = [device.get("name", "unknown device"), *known]
    words += clocks(results)
    words += [f"commit {', '.join(commits)}"] if commits else []
    sizes = {(r["shape"]["n"], r["shape"]["d"]) for p in COMPARED for r in rows(results, p)}
    words += [f"n = {n}, d = {d}" for n, d in sorted(sizes)]
    kind = "GPU" if device.get("type") == "cuda" else "Rehearsal, not on a GPU"
    return (
        f"{kind}: {', '.join(words)}. Medians; bf16 weights; the floor is measured in the same run."
    )


def clocks(results: Results) -> list[str]:
    """The clocks that were seen, lowest to highest."""
    told: list[dict[str, Any]] = list(results.get("clocks", {}).values())
    seen = sorted({int(c["clocks.sm"].split()[0]) for c in told if c.get("clocks.sm")})
    if not seen:
        return []
    return [
        f"SM clock {seen[0]} MHz" if len(seen) == 1 else f"SM clock {seen[0]} to {seen[-1]} MHz"
    ]


def first(row: Row) -> str:
    """First line of what a row says."""
    told = str(row.get("line") or row.get("reason") or "").splitlines()
    return told[0] if told else ""
