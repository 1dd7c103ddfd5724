"""Runs the suites of a checkout's `bench/`, a process each, and merges what they measured.

Each suite has a process of its own, so that none inherits what another leaves in memory or in the
environment. This process sleeps meanwhile, but for a line a case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import CHECKOUT, Results

BENCH = CHECKOUT / "bench"
SUITES = ("encode", "decode", "backward", "step", "layers", "small")
SWEEP, SAELENS, SPARSIFY = "sweep", "saelens", "sparsify"
PEERS = {SAELENS: "sae_lens", SPARSIFY: "sparsify"}
"""Libraries to compare with, and the modules they are."""
PEERS_PYTHON = CHECKOUT / ".venv-peers" / "bin" / "python"
NOTHING_CHOSEN = 5
"""pytest's exit status when no test matches."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        suites: of `SUITES`, `SWEEP` and `SAELENS`.
        shapes: set of sizes that the suites know.
        matching: pytest's `-k`; empty for all cases.
        against: of `compile` and `PEERS`.
        rounds: fewest rounds of a case.
        command: what the result file says it is from.
    """

    suites: Sequence[str]
    shapes: str
    matching: str
    against: Sequence[str]
    rounds: int
    command: str


class Failed(Exception):
    """Nothing was measured: no case matches, or all that were tried failed."""


def missing() -> str:
    """Why the suites cannot run here, and what to do about it; empty when they can."""
    if not (BENCH / "conftest.py").exists():
        return (
            "bench: the benchmark suites are part of the source checkout, not of the installed "
            "package. In a checkout of gemmascope-fast: make bench ARGS=--quick. "
            "(--results, --report and --compare work here, on files measured there.)"
        )
    wanted = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "rich": "rich"}
    lacking = [
        package for module, package in wanted.items() if not importlib.util.find_spec(module)
    ]
    if lacking:
        return f"bench: {' and '.join(lacking)} not installed: pip install {' '.join(lacking)}"
    if importlib.util.find_spec("gemmascope_fast._testing") is None:
        return "bench: the compiled library is missing in this checkout: make build"
    if shutil.which("cc") is None:
        return "bench: no C compiler `cc` on the PATH, which compiles the ceilings' loops"
    return ""


def interpreter(peer: str) -> str | None:
    """A Python that has this peer: ours, or that of `.venv-peers`; None where neither has it."""
    module = PEERS[peer]
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    if PEERS_PYTHON.exists():
        asked = [
            str(PEERS_PYTHON),
            "-c",
            f"import importlib.util as u; u.find_spec('{module}').name",
        ]
        if subprocess.run(asked, capture_output=True).returncode == 0:
            return str(PEERS_PYTHON)
    return None


def interpreters(peers: Sequence[str]) -> dict[str, str]:
    """A Python for each of these peers.

    Raises:
        ModuleNotFoundError: some are not installed; the message names all of them.
    """
    found = {peer: interpreter(peer) for peer in peers}
    if lacking := [peer for peer, python in found.items() if python is None]:
        modules = " and ".join(PEERS[peer] for peer in lacking)
        raise ModuleNotFoundError(
            f"bench: {' and '.join(lacking)} cannot take part, because {modules} can be imported "
            "neither here nor in .venv-peers, an environment that `make .venv-peers/.installed` "
            "sets up in a checkout"
        )
    return {peer: python for peer, python in found.items() if python is not None}


def run(plan: Plan, say: Callable[[str, int, str], None]) -> tuple[Results, list[str]]:
    """Measure; `say(suite, cases, line)` is called with every line of a suite, 0 cases at first.

    Returns:
        One file of pytest-benchmark's, with `command`, and `integrations` where peers have them;
        and what the suites said in which a case failed: the other cases are in the file.

    Raises:
        Failed: nothing was measured.
        ModuleNotFoundError: a peer is not installed.
    """
    asked = [peer for peer in PEERS if peer in plan.suites or peer in plan.against]
    pythons = interpreters(asked)
    merged: Results = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for suite in plan.suites:
            file = Path(folder) / f"{suite}.json"
            arguments = [pythons.get(suite, sys.executable), "-m", "pytest", *options(plan, suite)]
            failures += follow([*arguments, f"--benchmark-json={file}"], suite, say)
            if file.exists() and (found := json.loads(file.read_text() or "{}")).get("benchmarks"):
                found["benchmarks"] = merged.get("benchmarks", []) + found["benchmarks"]
                merged = {**found, **{k: v for k, v in merged.items() if k != "benchmarks"}}
        if SPARSIFY in asked:
            file = Path(folder) / "sparsify.json"
            script = [pythons[SPARSIFY], "bench/bench_integrations.py", "--host", SPARSIFY]
            sizes = [] if plan.shapes == "named" else ["--n=512", "--d-sae=16384"]
            failures += follow([*script, *sizes, "--json", str(file)], SPARSIFY, say)
            if file.exists():
                merged["integrations"] = json.loads(file.read_text())
    if not merged.get("benchmarks"):
        none = f"no case of {', '.join(plan.suites)} matches -k {plan.matching!r}"
        raise Failed("\n\n".join(failures) or none)
    return {"command": plan.command, **merged}, failures


def options(plan: Plan, suite: str) -> list[str]:
    """Arguments for pytest."""
    made = [f"bench/bench_{suite}.py", "--benchmark-only", "--benchmark-quiet", "-q"]
    made += ["-p", "no:cacheprovider", f"--shapes={plan.shapes}", f"--rounds={plan.rounds}"]
    made += [f"--against={','.join(plan.against)}"]
    return made + (["-k", plan.matching] if plan.matching else [])


def follow(command: Sequence[str], suite: str, say: Callable[[str, int, str], None]) -> list[str]:
    """Run a suite to its end, telling its lines; returns the last ones if something failed."""
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    cases, last = 0, [""]
    merge: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=CHECKOUT, env=env, **merge) as process:
        say(suite, 0, "")
        for line in lines(process):
            if line.startswith("cases: "):
                cases = int(line.removeprefix("cases: "))
            say(suite, cases, line)
            last = [*last[-60:], line]
    failed = process.returncode not in (0, NOTHING_CHOSEN)
    return ["\n".join([f"bench_{suite} failed:", *last])] if failed else []


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """What a process prints, line by line."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip("\n")
