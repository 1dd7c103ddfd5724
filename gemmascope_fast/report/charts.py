"""Plots of results as SVG text, by matplotlib (imported when called); None where data is missing.

Rows are those of rows.py. Axes of time, memory, d_sae and L0 are logarithmic.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .rows import OURS, OWN, Row, milliseconds

COLOURS = {
    OURS: "#0b7a75",
    "dense fp32": "#c44e2b",
    "dense": "#c44e2b",
    "dense eager": "#c44e2b",
    "dense bf16": "#e0a458",
    "matmul": "#6c757d",
    "embedding_bag": "#5b6bbf",
    "dense fp32, torch.compile": "#8d4fa3",
    "torch.compile": "#8d4fa3",
    "ours, unpacked": "#2a9df4",
    "ours, direct": "#6a4c93",
    "ours, unfused": "#b5179e",
}
OTHERS = ("#577590", "#bc6c25", "#90be6d", "#495057", "#b5179e", "#2a9df4", "#e9c46a", "#6a4c93")
PARTS = {"encode": "#0b7a75", "decode and loss": "#5b6bbf", "backward": "#c44e2b"}
PARTS |= {"optimizer": "#e0a458"}
FEWEST = 3
"""Points that make a curve."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "gemmascope_fast",  # the same bytes for the same data
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Points = dict[str, list[tuple[float, float]]]


def draw(across: float, height: float, panels: int, fill: Callable[[Any], None]) -> str:
    """SVG of a figure with `panels` axes side by side, which `fill` is given."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(across, height), layout="constrained")
        fill(figure.subplots(1, panels, squeeze=False)[0])
        held = io.StringIO()
        figure.savefig(
            held, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = held.getvalue()
    return text[text.index("<svg") :]


def colour(name: str) -> str:
    """The colour of a contender, the same in every plot."""
    return COLOURS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]


# ---- curves


def curves(rows: Iterable[Row], over: str) -> dict[str, list[Row]]:
    """Rows that differ in `over` (`d_sae` or `l0`) alone, sorted by it; where there are enough."""
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        shape = row["shape"]
        others = [f"{k} {shape[k]:,.6g}" for k in ("n", "d", "d_sae", "l0") if k != over]
        words = str(shape.get("inputs") or shape["firing"]).split(", ")
        words = [word for word in words if "touched" not in word]
        title = f"{row['op']}: {', '.join(others)}, {' '.join(words)}"
        found.setdefault(title.replace("_", " ").replace("d sae", "latents"), {}).setdefault(
            shape[over], row
        )
    return {
        title: [held[x] for x in sorted(held)]
        for title, held in found.items()
        if len(held) >= FEWEST
    }


def points(rows: Sequence[Row], over: str, quantity: str) -> Points:
    """Per contender `(x, quantity)`; what was not measured is left out."""
    found: Points = {}
    for row in rows:
        for name, taken in row["times"].items():
            if taken.get(quantity):
                found.setdefault(name, []).append((row["shape"][over], taken[quantity]))
    return found


def curve(rows: Sequence[Row], title: str, over: str) -> str:
    """Time and memory of every contender over d_sae or L0, and where dense becomes faster."""

    def fill(axes: Any) -> None:
        kinds = (("median_s", "time of a call [ms]", 1e3), ("peak_extra_bytes", *MEMORY))
        for panel, (quantity, label, scale) in zip(axes, kinds, strict=True):
            for name, found in points(rows, over, quantity).items():
                x, y = zip(*found, strict=True)
                style = {"color": colour(name), "label": name, "marker": "o", "markersize": 4}
                panel.plot(x, [scale * value for value in y], **style)
            logarithmic(panel, [row["shape"][over] for row in rows])
            panel.set(xlabel=NAMES[over], ylabel=label)
        if over == "l0":
            mark_crossover(axes[0], points(rows, over, "median_s"))
        axes[0].legend()
        axes[0].figure.suptitle(title, fontsize=10)

    return draw(8.6, 3.3, 2, fill)


MEMORY = ("memory that a call adds [MiB]", 2.0**-20)
NAMES = {"d_sae": "latents (d_sae)", "l0": "active latents per token (L0)"}


def logarithmic(axes: Any, x: Sequence[float]) -> None:
    """Both axes logarithmic, a tick at every measured x and at 1, 2 and 5 of each decade of y."""
    from matplotlib.ticker import LogLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(x, [width(value) for value in x])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def width(value: float) -> str:
    """A number of latents in few characters: 512, 16k, 1M."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 2**10:.0f}k" if value < 2**20 else f"{value / 2**20:.0f}M"


def crossover(ours: Sequence[tuple[float, float]], dense: Sequence[tuple[float, float]]) -> float:
    """x where ours reaches dense's time, between two measured points on logarithmic axes.

    Infinite where ours is faster everywhere, 0 where it is nowhere.
    """
    theirs = dict(dense)
    gaps = [(x, math.log(y / theirs[x])) for x, y in ours if x in theirs]
    if not gaps or gaps[-1][1] <= 0:
        return math.inf
    below = [i for i, (_, gap) in enumerate(gaps) if gap <= 0]
    if not below:
        return 0.0
    (x0, g0), (x1, g1) = gaps[below[-1]], gaps[below[-1] + 1]
    return math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * -g0 / (g1 - g0))


def mark_crossover(axes: Any, found: Points) -> None:
    """A line where float32 dense PyTorch becomes faster, or a remark that it does not."""
    dense = next((name for name in found if name.startswith("dense") and "bf16" not in name), None)
    if dense is None or OURS not in found:
        return
    at = crossover(found[OURS], found[dense])
    told = f"{dense} is faster from L0 = {at:.0f}" if 0 < at < math.inf else ""
    if told:
        axes.axvline(at, color="#555555", linewidth=0.8, linestyle="--")
    told = told or (f"{OURS} is faster throughout" if at else f"{dense} is faster throughout")
    axes.set_title(told, fontsize=8, loc="left")


# ---- roofline


def roofline(rows: Iterable[Row]) -> str | None:
    """Operations per second over operations per byte of our ops, under the measured ceilings."""
    costed = [row for row in rows if row.get("cost", {}).get("flops") and row.get("rates")]
    rates: dict[str, float] = {}
    for row in costed:
        for name, rate in row["rates"].items():
            rates[name] = max(rate, rates.get(name, 0.0))
    memory = [name for name in ("copy", "random rows") if name in rates]
    peaks = [name for name in ("int8 tile", "fp32 unit", "fp32 matmul") if name in rates]
    if not memory or not peaks:
        return None

    def fill(axes: Any) -> None:
        panel = axes[0]
        places: dict[str, list[tuple[float, float]]] = {}
        for row in costed:
            work, taken = row["cost"], row["times"][OURS]["median_s"]
            intensity = work["flops"] / work["bytes"]
            places.setdefault(row["op"], []).append((intensity, work["flops"] / taken / 1e9))
        every = [x for found in places.values() for x, _ in found]
        low, high = min(every) / 3, max(max(every), rates[peaks[0]] / rates[memory[0]]) * 3
        ceilings(panel, rates, memory, peaks, (low, high))
        for op, (rank, found) in zip(places, enumerate(places.values()), strict=True):
            x, y = zip(*found, strict=True)
            shade = OTHERS[rank % len(OTHERS)] if rank else COLOURS[OURS]
            style = {"marker": "o^sDvP*X"[rank % 8], "color": shade, "label": op.replace("_", " ")}
            panel.plot(x, y, linestyle="", markersize=6, **style)
        panel.set(xscale="log", yscale="log", xlim=(low, high))
        panel.set(xlabel="operations per compulsory byte", ylabel="useful operations [GFLOP/s]")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw(8.6, 4.2, 1, fill)


def ceilings(
    axes: Any,
    rates: dict[str, float],
    memory: Sequence[str],
    peaks: Sequence[str],
    span: tuple[float, float],
) -> None:
    """The slopes of memory up to the highest peak, and the peaks from the fastest memory on."""
    low, high = span
    fastest, top = max(rates[name] for name in memory), max(rates[name] for name in peaks)
    line = {"color": "#555555", "linewidth": 1}
    for name in memory:
        ridge = top / rates[name]
        end = min(ridge, high)
        axes.plot([low, end], [rates[name] * x / 1e9 for x in (low, end)], **line)
        told = f"{name} {rates[name] / 1e9:.0f} GB/s"
        axes.annotate(
            told, (low, rates[name] * low / 1e9), (4, 6), textcoords="offset points", fontsize=7
        )
    for name in peaks:
        axes.plot([rates[name] / fastest, high], [rates[name] / 1e9] * 2, **line)
        told = f"{name} {rates[name] / 1e9:.0f} G/s"
        where = {"textcoords": "offset points", "fontsize": 7, "ha": "right"}
        axes.annotate(told, (high, rates[name] / 1e9), (-2, 3), **where)


# ---- parts of a step


def breakdown(rows: Iterable[Row]) -> str | None:
    """Shares of a training step, of every contender that timed its parts."""
    bars = [
        (row, name, taken)
        for row in rows
        for name, taken in row["times"].items()
        if taken.get("stages")
    ]
    if not bars:
        return None

    def fill(axes: Any) -> None:
        panel, labels = axes[0], []
        for height, (row, name, taken) in enumerate(reversed(bars)):
            shape, total = row["shape"], sum(taken["stages"].values())
            size = f"n {shape['n']:,}, {shape['d']:,} x {shape['d_sae']:,}, L0 {shape['l0']:.0f}"
            labels.append(f"{name.removeprefix(OWN)}, {milliseconds(total)}\n{size}")
            left = 0.0
            for part, seconds in taken["stages"].items():
                share = 100 * seconds / total
                known = {"color": PARTS.get(part, "#999999"), "height": 0.62}
                first = {"label": part} if height == 0 else {}
                panel.barh(height, share, left=left, **known, **first)
                if share > 7:
                    text = {"ha": "center", "va": "center", "color": "white", "fontsize": 7}
                    panel.text(left + share / 2, height, milliseconds(seconds), **text)
                left += share
        panel.set_yticks(range(len(labels)), labels, fontsize=7)
        panel.set(xlabel="share of the step [%]", xlim=(0, 100))
        panel.grid(axis="y", visible=False)
        panel.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(PARTS))

    return draw(8.6, 1.1 + 0.42 * len(bars), 1, fill)
