"""`pytest bench --benchmark-only`: sizes, one measurement per case, results with their machine.

    --shapes toy|quick|small|named|sweep
                                sizes: of the tests, of a first look, of a laptop (default), of the
                                README, of its curves
    --against compile           adds torch.compile'd dense PyTorch
    --rounds 5                  fewest rounds of a case
    --malloc kept|default       whether freed blocks are kept (default), so that no contender pays
                                for page faults, or large ones returned, as glibc does unasked

A module of benchmarks has `specs(shapes)`, and tests that take `rounds`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaving import Measured, Spec, measure, rounds_clock
from memory import release
from problems import forget

from gemmascope_fast import __version__, _testing, ops

SECONDS = {"toy": 0.0, "quick": 1.0, "small": 1.0, "named": 4.0, "sweep": 1.5}
"""Of the rounds of one case, unless the fewest rounds take longer."""
MOST = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gemmascope_fast")
    group.addoption("--shapes", choices=list(SECONDS), default="small", help="sizes to measure")
    group.addoption("--rounds", type=int, default=5, help="fewest rounds of a case")
    group.addoption("--against", default="", help="optional contenders, separated by commas")
    told = "what becomes of freed memory while calls are timed"
    group.addoption("--malloc", choices=["kept", "default"], default="kept", help=told)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rounds" not in metafunc.fixturenames:
        return
    against = metafunc.config.getoption("--against").split(",")
    specs = metafunc.module.specs(metafunc.config.getoption("--shapes"))
    found = [spec.chosen(against) for spec in specs]
    params = [
        pytest.param(
            (spec, contender),
            id=f"{spec.name}-{contender.replace(', ', '-').replace(' ', '-')}",
            marks=pytest.mark.benchmark(group=spec.name, timer=rounds_clock),
        )
        for spec in found
        for contender in spec.contenders
    ]
    metafunc.parametrize("rounds", params, indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell how many cases follow, for whoever shows progress."""
    cases = {i.callspec.params["rounds"][0].name for i in session.items if hasattr(i, "callspec")}
    print(f"cases: {len(cases)}", flush=True)


class Latest:
    """The case that was measured last: its tests follow each other."""

    spec: Spec | None = None
    measured: Measured | None = None

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def of(self, spec: Spec) -> Measured:
        if self.spec is not spec or self.measured is None:
            self.drop()
            self.spec, self.measured = spec, self.measure(spec)
        return self.measured

    def measure(self, spec: Spec) -> Measured:
        shapes, fewest = (self.config.getoption(name) for name in ("--shapes", "--rounds"))
        kept = self.config.getoption("--malloc") == "kept"
        case = spec.build()
        case = replace(case, calls={name: case.calls[name] for name in spec.contenders})
        found = measure(case, SECONDS[shapes], fewest, max(MOST, fewest), kept)
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n== {spec.name}", *found.lines(), sep="\n", flush=True)
        return found

    def drop(self) -> None:
        """Give its memory back."""
        self.spec = self.measured = None
        release()


@pytest.fixture(scope="module")
def latest(request: pytest.FixtureRequest) -> Iterator[Latest]:
    held = Latest(request.config)
    yield held
    held.drop()
    forget()
    release()


@pytest.fixture
def rounds(request: pytest.FixtureRequest, latest: Latest) -> tuple[Measured, str]:
    """The rounds of a case, all its contenders interleaved, and the contender to report."""
    spec, contender = request.param
    return latest.of(spec), contender


# ---- the results' file


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What a result depends on beside its sizes."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": _testing.simd_target_name(_testing.simd_target()),
        "mhz": clock_mhz(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "malloc": config.getoption("--malloc"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemmascope_fast": __version__,
        "ops": {name: ops.implementation(name, "cpu") for name in ops.TABLE},
    }


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Keep what names the state of the checkout."""
    for name in set(commit_info) - {"id", "dirty", "time"}:
        del commit_info[name]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Drop what says nothing: a timer that replays has no options."""
    for row in output_json["benchmarks"]:
        for name in ("options", "params", "param", "fullname"):
            row.pop(name, None)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def clock_mhz() -> list[int]:
    """Of every processor, as the kernel tells it now."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [round(float(t.split(":")[1])) for t in lines if t.startswith("cpu MHz")]
