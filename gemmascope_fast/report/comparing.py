"""Two runs of the same suites: which ops became slower, beyond the noise of their rounds.

Machines and moments differ, so a time is first divided by a yardstick of its own round: the
geometric mean of the contenders that are not ours, or the ceiling that bounds the op where there
are none. Of these ratios' logarithms the difference of medians, B less A, has a bootstrap interval
(`scipy.stats.bootstrap`, percentile method, fixed seed) of 99 %. An op is slower when the whole
interval lies above 1 + `MARGIN`: rounds of one process do not know how processes differ among
themselves (pages, clocks). Calls of a few milliseconds need more rounds (`--rounds`) than the five
that a suite takes at least: their intervals are wide.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import OURS, OWN, Results, Row, benchmarks, cpu_rows, machine_of, peers

MARGIN = 0.10
"""Share of an op's time within which two processes may differ."""
LEVEL = 0.99
RESAMPLES = 9999
SLOWER, FASTER, SAME = "SLOWER", "faster", "same"


@dataclass(frozen=True)
class Change:
    """What became of one contender of ours from A to B.

    Attributes:
        name: of the case, and of the contender where it is not the default one.
        yardstick: what times were divided by.
        ratio: of medians, B's over A's, after the yardstick.
        low, high: its interval.
    """

    name: str
    yardstick: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`SLOWER`, `FASTER` or `SAME`."""
        if self.low > 1 + MARGIN:
            return SLOWER
        return FASTER if self.high < 1 / (1 + MARGIN) else SAME


def compared(a: Results, b: Results) -> tuple[list[Change], list[str], list[str]]:
    """Changes of the cases that both have, and the names of those that only A or only B has."""
    ours = [contenders(results) for results in (a, b)]
    shared = [name for name in ours[0] if name in ours[1]]
    changes = [change(name, ours[0][name], ours[1][name]) for name in shared]
    only_a, only_b = ([n for n in x if n not in y] for x, y in (ours, ours[::-1]))
    return changes, only_a, only_b


def contenders(results: Results) -> dict[str, tuple[Row, str]]:
    """Every contender of ours with its row, by a name."""
    return {
        row["group"] + ("" if name == OURS else f", {name.removeprefix(OWN)}"): (row, name)
        for row in cpu_rows(results)
        for name in row["times"]
        if name == OURS or name.startswith(OWN)
    }


def change(name: str, a: tuple[Row, str], b: tuple[Row, str]) -> Change:
    """One contender's change."""
    import numpy
    from scipy.stats import bootstrap

    others = [peer for peer in peers(a[0]) if peer in b[0]["times"]]
    bounds = [c for c in a[0].get("speeds", {}) if c in b[0].get("speeds", {})]
    yardstick = " and ".join(others) or (bounds[0] if bounds else "none")
    x, y = (numpy.log(ratios(row, contender, others, bounds[:1])) for row, contender in (a, b))

    def statistic(x: Any, y: Any, axis: int) -> Any:
        return numpy.median(y, axis=axis) - numpy.median(x, axis=axis)

    middle = float(statistic(x, y, axis=-1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounds that are all alike have an interval of no width
        found = bootstrap(
            (x, y),
            statistic,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=numpy.random.default_rng(0),
        ).confidence_interval
    return Change(name, yardstick, *(math.exp(v) for v in (middle, found.low, found.high)))


def ratios(row: Row, contender: str, others: Sequence[str], bounds: Sequence[str]) -> list[float]:
    """Seconds of every round over the yardstick's seconds in it."""
    own = row["times"][contender]["rounds_s"]
    if others:
        times = [row["times"][other]["rounds_s"] for other in others]
        yard = [math.exp(sum(map(math.log, t)) / len(t)) for t in zip(*times, strict=True)]
    elif bounds:
        yard = [1 / rate for rate in row["speeds"][bounds[0]]]
    else:
        yard = [1.0] * len(own)
    return [mine / other for mine, other in zip(own, yard, strict=True)]


def main(first: Path, second: Path) -> int:
    """Print the table; 1 when something became slower, 0 otherwise.

    Raises:
        ModuleNotFoundError: scipy is not installed.
        ValueError: a file holds no rounds, or the two have no case in common.
    """
    try:
        import scipy  # noqa: F401
    except ModuleNotFoundError as error:
        told = "bench: --compare needs scipy, which is not installed: pip install scipy"
        raise ModuleNotFoundError(told) from error
    a, b = benchmarks(first), benchmarks(second)
    for path, results in ((first, a), (second, b)):
        if not all(one["stats"].get("data") for one in results["benchmarks"]):
            raise ValueError(f"bench: {path} holds no single rounds: measure it with this command")
    changes, only_a, only_b = compared(a, b)
    if not changes:
        raise ValueError(f"bench: {first} and {second} have no case in common")
    for path, results in ((first, a), (second, b)):
        print(f"{path}: {machine_of(results)}")
    if machine_of(a) != machine_of(b):
        print("Machines or versions differ: times are compared through the yardsticks alone.")
    width = max(len(c.name) for c in changes)
    print(f"\n{'case':{width}}  B / A   99 % interval   verdict  yardstick")
    for c in sorted(changes, key=lambda c: -c.ratio):
        told = f"{c.ratio:5.2f}   {c.low:5.2f} to {c.high:5.2f}"
        print(f"{c.name:{width}}  {told}  {c.verdict:7}  {c.yardstick}")
    for path, names in ((first, only_a), (second, only_b)):
        if names:
            print(f"only in {path}: {', '.join(names)}")
    slower = sum(c.verdict == SLOWER for c in changes)
    print(f"\n{slower} of {len(changes)} slower by more than {MARGIN:.0%} at 99 % confidence.")
    return 1 if slower else 0
