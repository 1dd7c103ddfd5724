"""Contenders of one case, measured in interleaved rounds together with the machine's ceilings.

A round calls every contender once, each round beginning with another, and then every ceiling, so
that a neighbour on the machine or its clock meets all of them alike. pytest-benchmark runs its
tests one after another; therefore a case is measured as a whole when its first test asks for it,
and every test hands its own contender's rounds over by `replay`: pytest-benchmark's timer is
`rounds_clock`, which moves by a measured round at each call and not otherwise.

By default freed memory is kept while rounds are timed, so that page faults are nobody's time; what
a call adds to memory is measured apart (memory.py).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ceilings import Ceiling
from memory import Memory, keep_freed_memory, memory_of

from gemmascope_fast.costs import Cost
from gemmascope_fast.report import OURS, OWN, verdict

Call = Callable[[int], object]
"""A contender: takes the number of the call, to rotate its inputs."""
Rates = Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """A number the case is held to.

    Attributes:
        text: what is promised, without the number.
        goal: the number.
        found: reads the measured number.
        at_most: whether the goal is an upper bound.
    """

    text: str
    goal: float
    found: Callable[[Measured], float]
    at_most: bool = False

    def verdict(self, measured: Measured) -> dict[str, Any]:
        """`{"text", "goal", "at_most", "found", "met"}`."""
        found = self.found(measured)
        met = found <= self.goal if self.at_most else found >= self.goal
        told = {"text": self.text, "goal": self.goal, "at_most": self.at_most}
        return {**told, "found": found, "met": met}


@dataclass(frozen=True)
class Case:
    """One comparison whose results have been found equal.

    Attributes:
        op: what is measured.
        shape: `n`, `d`, `d_sae`, `l0`, and `inputs` in words.
        calls: contenders; `OURS` is judged.
        ceilings: measured in every round; their best rates make the floor.
        floor: seconds that no implementation on this machine can beat, of the rates.
        floor_text: what that is.
        cost: operations and compulsory bytes, from the op table.
        bound: whether operations or bytes bound it: the rate that is reported.
        facts: what else was found out (entries, touched latents, candidates).
        targets: that speak of this case.
        stages: of contenders that time their own parts.
        repeats: calls that are timed together, where one is too short for the clock.
    """

    op: str
    shape: dict[str, Any]
    calls: Mapping[str, Call]
    ceilings: Mapping[str, Ceiling]
    floor: Callable[[Rates], float]
    floor_text: str
    cost: Cost
    bound: Literal["flops", "bytes"]
    facts: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    stages: Mapping[str, Stages] = field(default_factory=dict)
    repeats: int = 1


class Stages:
    """Seconds of the parts of a call, one after the other: `begin`, then `end` of each."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {}

    def begin(self) -> None:
        self._since = time.perf_counter()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.taken.setdefault(part, []).append(now - self._since)
        self._since = now

    def medians(self, rounds: int) -> dict[str, float]:
        """Of the last `rounds` calls."""
        return {part: statistics.median(all_[-rounds:]) for part, all_ in self.taken.items()}


@dataclass(frozen=True)
class Spec:
    """A case before it is built: its name, its contenders, and how to build it.

    `optional` contenders take part where `--against` names them.
    """

    name: str
    contenders: tuple[str, ...]
    build: Callable[[], Case]
    optional: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, against: Sequence[str]) -> Spec:
        """With the optional contenders that `against` names."""
        more = tuple(name for name, asked in self.optional.items() if asked in against)
        return replace(self, contenders=self.contenders + more, optional={})


@dataclass(frozen=True)
class Measured:
    """A case with its rounds, of contenders (seconds) and of ceilings (rates)."""

    case: Case
    samples: Mapping[str, list[float]]
    speeds: Mapping[str, list[float]]
    memory: Mapping[str, Memory]

    @property
    def rates(self) -> Rates:
        """The best rate of each ceiling."""
        return {name: max(found) for name, found in self.speeds.items()}

    def median(self, name: str = OURS) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, other: str, name: str = OURS) -> float:
        """How many times as fast as `other`."""
        return self.median(other) / self.median(name)

    def of_floor(self, name: str = OURS) -> float:
        return self.case.floor(self.rates) / self.median(name)

    def peers(self) -> list[str]:
        """Contenders that are not ours."""
        return [name for name in self.samples if name != OURS and not name.startswith(OWN)]

    def lines(self) -> list[str]:
        """One line per contender, then facts, ceilings and verdicts."""
        found = []
        for name, samples in self.samples.items():
            low, high = 1e3 * min(samples), 1e3 * max(samples)
            against = [f"{self.ratio(o, name):.2f}x {o}" for o in self.peers() if o != name]
            found.append(
                f"{name:22} {1e3 * self.median(name):9.2f} ms ({low:.2f} to {high:.2f}), "
                f"{100 * self.of_floor(name):3.0f} % of the floor, "
                f"+{self.memory[name].peak / 2**20:.1f} MiB  {', '.join(against)}"
            )
        found += [f"  {name}: {fact}" for name, fact in self.case.facts.items()]
        found += [f"  {name}: {rate / 1e9:.1f} G/s" for name, rate in self.rates.items()]
        return found + ["  " + verdict(t.verdict(self)) for t in self.case.targets]

    def told(self, name: str) -> dict[str, Any]:
        """What stands beside the times of a contender."""
        case, ours = self.case, name == OURS
        seconds, cost = self.median(name), case.cost
        stages = case.stages[name].medians(len(self.samples[name])) if name in case.stages else {}
        return {
            **{"op": case.op, "contender": name, "shape": case.shape},
            "ratios": {other: self.ratio(other, name) for other in self.samples if other != name},
            **{"floor": case.floor_text, "floor_s": case.floor(self.rates)},
            **{"of_floor": self.of_floor(name), "rates": dict(self.rates)},
            "tflops": cost.flops / seconds / 1e12 if case.bound == "flops" else None,
            "gb_per_s": cost.bytes / seconds / 1e9 if case.bound == "bytes" else None,
            "cost": {"flops": cost.flops, "bytes": cost.bytes},
            "peak_extra_bytes": self.memory[name].peak,
            "kept_bytes": self.memory[name].kept,
            "stages": stages,
            "speeds": dict(self.speeds) if ours else {},
            "facts": dict(case.facts) if ours else {},
            "targets": [t.verdict(self) for t in case.targets] if ours else [],
        }


def measure(case: Case, budget_s: float, fewest: int, most: int, keep: bool) -> Measured:
    """Time every contender in about `budget_s` seconds, within `fewest` to `most` rounds.

    `keep`: whether malloc keeps freed memory while rounds are timed.
    """
    names = list(case.calls)
    memory, once = {}, 0.0
    for name, call in case.calls.items():
        call(0)  # threads, code, first buffers
        memory[name] = memory_of(call)
        keep_freed_memory(keep)
        once += case.repeats * seconds_of(call, 1, case.repeats)  # makes the kept memory resident
    rounds = max(fewest, min(most, int(budget_s / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in case.ceilings}
    for ceiling in case.ceilings.values():
        ceiling(0)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            samples[name].append(seconds_of(case.calls[name], turn + place, case.repeats))
        for name, ceiling in case.ceilings.items():
            speeds[name].append(ceiling(turn))
    return Measured(case, samples, speeds, memory)


def seconds_of(call: Call, turn: int, repeats: int = 1) -> float:
    """Duration of one call of `repeats`, results dropped, without the garbage collector."""
    collecting = gc.isenabled()
    gc.disable()
    began = time.perf_counter()
    for _ in range(repeats):
        call(turn)
    taken = time.perf_counter() - began
    if collecting:
        gc.enable()
    return taken / repeats


# ---- for pytest-benchmark

_now = 0.0


def rounds_clock() -> float:
    """Seconds of all rounds replayed so far."""
    return _now


def replay(benchmark: Any, measured: Measured, contender: str) -> None:
    """Give a contender's rounds to pytest-benchmark, with what stands beside them."""
    rounds = iter(measured.samples[contender])

    def following(rounds: Iterator[float] = rounds) -> None:
        global _now
        _now += next(rounds)

    benchmark.extra_info.update(measured.told(contender))
    benchmark.pedantic(following, rounds=len(measured.samples[contender]))
