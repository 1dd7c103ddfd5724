"""The measurements of bench_integrations.py as Markdown, and where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("README.md", "docs/integrations.md")
BEGIN, END = "<!-- integrations:begin -->", "<!-- integrations:end -->"
TITLES = {
    "saelens": "SAELens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "circuit_tracer": "circuit-tracer",
}
SIZES = {"n": 1024, "d": 1152, "d_sae": 65536}
"""What the targets speak of, on two cores."""

TARGETS = (
    ("SAELens JumpReLU training step", "saelens", "train jumprelu", "faster", 10.0),
    ("its transient memory", "saelens", "train jumprelu", "smaller", 20.0),
    ("SAELens JumpReLU forward", "saelens", "forward jumprelu", "faster", 5.0),
    ("sparsify training step", "sparsify", "step", "faster", 4.0),
)

Row = dict[str, Any]


def faster(row: Row) -> float:
    """Time without the backend over that with it."""
    return float(row["stock"]["median_ms"] / row["backend"]["median_ms"])


def smaller(row: Row) -> float:
    """Transient memory likewise."""
    return float(row["stock"]["peak_mib"] / max(row["backend"]["peak_mib"], 1.0))


def line(name: str, row: Row) -> str:
    """One row for a terminal."""
    stock, ours = row["stock"], row["backend"]
    text = f"{name:40} {stock['median_ms']:7.0f} -> {ours['median_ms']:6.0f} ms {faster(row):5.1f}x"
    text += f"   {stock['peak_mib']:6.0f} -> {ours['peak_mib']:5.0f} MiB {smaller(row):5.1f}x"
    return text + f"   agree to {row['agree_within']:.0e}"


def merge(path: Path, host: str, found: dict[str, Any]) -> None:
    """Put a host's rows into a file beside those that are there already."""
    results = json.loads(path.read_text()) if path.exists() else {}
    kept = results.get(host, {})
    rows = kept.get("rows", {}) if kept.get("version") == found["version"] else {}
    results[host] = {**found, "rows": {**rows, **found["rows"]}}
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """All rows, then the targets.

    Raises:
        ValueError: rows of several machines or sizes.
    """
    rows = [
        (f"{TITLES[host]} {results[host]['version']}", feature, row)
        for host in TITLES
        for feature, row in results.get(host, {}).get("rows", {}).items()
    ]
    settings = {
        json.dumps([row[k] for k in ("cpu", "capability", "threads", "torch", "arguments")])
        for _, _, row in rows
    }
    if len(settings) != 1:
        raise ValueError(f"expected rows of one machine and size, got {sorted(settings)}")
    first = rows[0][2]
    sizes = first["arguments"]
    head = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}; n = {sizes['n']:,}, "
        f"d = {sizes['d']:,}, d_sae = {sizes['d_sae']:,}, L0 = k = {sizes['l0']}, float32; medians "
        f"of {sizes['repeats']} turns. Memory: beyond weights, their gradients and the optimizer."
    )
    lines = [head, "", "| host | call | time | | transient memory | |", "|---|---|---|---|---|---|"]
    before = None
    for host, feature, row in rows:
        stock, ours = row["stock"], row["backend"]
        lines.append(
            f"| {host if host != before else ''} | {feature} "
            f"| {stock['median_ms']:,.0f} → {ours['median_ms']:,.0f} ms | {faster(row):.1f}x "
            f"| {stock['peak_mib']:,.0f} → {ours['peak_mib']:,.0f} MiB | {smaller(row):.0f}x |"
        )
        before = host
    missing = [title for host, title in TITLES.items() if host not in results]
    told = [f"Not measured: {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, "", " ".join([*told, targets(results)])])


def targets(results: dict[str, Any]) -> str:
    """Each target, met or missed."""
    found = []
    for text, host, feature, kind, goal in TARGETS:
        row = results.get(host, {}).get("rows", {}).get(feature)
        if row is None:
            found.append(f"{text}: not measured")
            continue
        ratio = {"faster": faster, "smaller": smaller}[kind](row)
        verdict = "met" if ratio >= goal else "**missed**"
        found.append(f"{text} {ratio:.1f}x {kind} (target {goal:.0f}x: {verdict})")
    return "Targets: " + "; ".join(found) + "."


def rewrite(results: dict[str, Any]) -> None:
    """Replace what stands between the markers of the documentation.

    Raises:
        ValueError: a place has not exactly one pair of markers.
    """
    text = table(results)
    for place in PLACES:
        old = (ROOT / place).read_text()
        if (old.count(BEGIN), old.count(END)) != (1, 1):
            raise ValueError(f"{place}: expected {BEGIN} and {END}, once each")
        before, after = old.split(BEGIN)[0], old.split(END)[1]
        (ROOT / place).write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
