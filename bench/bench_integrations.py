"""Other SAE libraries with and without this backend: time and transient memory of the same calls.

    python bench/bench_integrations.py [--host saelens --feature "train jumprelu"] [--d-sae 65536]
    make bench-integrations      # all, into bench/results and the tables of the documentation

Each row is one call of a host library, with its own classes and trainer, in two processes that
alternate: as the host ships it, and with the backend installed. Before anything is timed the
numbers that both calls return (losses, norms of all gradients, counts of entries) must agree.
Medians of the calls of `--repeats` turns, of two seconds or one call each, after one turn more;
glibc's malloc keeps freed blocks meanwhile, so that no contender pays for page faults. Memory is
the growth of the resident set during one more call, all freed memory having been returned before;
of a training step, during forward and backward, less the gradients of the weights: what activations
take.

A host is a module beside this one, `integration_<host>.py`, with

    FEATURES  {name: make}, make(args) -> a call that returns numbers to compare; it may have
              `passes`, which is compared and whose memory is measured in its place, and
              `gradients`, the bytes that `passes` leaves in the gradients
    install() the backend for the whole process

A host that is not installed is left out with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import integration_table
import torch
from memory import keep_freed_memory, memory_of

HOSTS = {
    "saelens": ("sae_lens", "sae-lens"),
    "sparsify": ("sparsify", "eai-sparsify"),
    "dictionary_learning": ("dictionary_learning", "dictionary-learning"),
    "circuit_tracer": ("circuit_tracer", "circuit-tracer"),
}
"""Names of import and of distribution."""
SIZES = ("n", "d", "d_sae", "l0")
CONTENDERS = ("stock", "backend")
TOLERANCE = 1e-3
"""Of the numbers that are compared; rounding decides single gates."""
TURN_S = 2.0


def machine() -> dict[str, Any]:
    """What the rows were measured on."""
    names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def serve(args: argparse.Namespace) -> None:
    """In a process of its own: for every line of the input do what it names, print the result."""
    with contextlib.redirect_stdout(sys.stderr):  # what hosts print
        host = importlib.import_module(f"integration_{args.host[0]}")
        torch.manual_seed(0)
        if args.contender == "backend":
            host.install()
        keep_freed_memory(True)
        call = host.FEATURES[args.feature](args)
        passes = getattr(call, "passes", call)
        for line in sys.stdin:
            found: Any = None
            if line.strip() == "compare":
                found = passes()
            elif line.strip() == "time":
                found = turn(call)
            else:
                grown = memory_of(lambda _: passes()).peak
                found = (grown - getattr(call, "gradients", 0)) / 2**20
            print(json.dumps(found), file=sys.__stdout__, flush=True)


def turn(call: Any) -> list[float]:
    """Milliseconds of one call, and of more until `TURN_S` have passed."""
    found: list[float] = []
    while sum(found) < 1e3 * TURN_S:
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def command(args: argparse.Namespace, host: str, feature: str, contender: str) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
    chosen = [f"--host={host}", f"--feature={feature}", f"--contender={contender}"]
    return [sys.executable, __file__, *sizes, *chosen]


@contextlib.contextmanager
def contenders(args: argparse.Namespace, host: str, feature: str) -> Iterator[Any]:
    """`ask(what) -> {contender: answer}`, one after the other."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {
        c: subprocess.Popen(command(args, host, feature, c), stderr=subprocess.DEVNULL, **pipes)
        for c in CONTENDERS
    }

    def ask(what: str) -> dict[str, Any]:
        found = {}
        for contender, process in running.items():
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            found[contender] = json.loads(process.stdout.readline())
        return found

    try:
        yield ask
    finally:
        for process in running.values():
            process.stdin.close()
            process.wait()


def row(args: argparse.Namespace, host: str, feature: str) -> dict[str, Any]:
    """One feature: agreement, times and peaks."""
    with contenders(args, host, feature) as ask:
        numbers = ask("compare")
        off = {
            name: abs(numbers["backend"][name] - value) / (abs(value) or 1.0)
            for name, value in numbers["stock"].items()
        }
        worst = max(off, key=lambda name: off[name])
        if not off[worst] <= TOLERANCE:
            raise SystemExit(f"{host}, {feature}: {worst} differs by {off[worst]:.2g}")
        ask("time")
        turns = [ask("time") for _ in range(args.repeats)]
        peaks = ask("peak")
    found: dict[str, Any] = {"agree_within": off[worst]}
    for contender in CONTENDERS:
        times = [round(ms, 2) for one in turns for ms in one[contender]]
        median, peak = statistics.median(times), round(peaks[contender], 1)
        found[contender] = {"ms": times, "median_ms": median, "peak_mib": peak}
    return found


def measured(args: argparse.Namespace, host: str) -> dict[str, Any]:
    """The rows of one host and what they were measured with."""
    features = importlib.import_module(f"integration_{host}").FEATURES
    facts = {name: getattr(args, name) for name in (*SIZES, "repeats")}
    rows = {}
    for feature in features:
        if args.feature in (None, feature):
            rows[feature] = {**row(args, host, feature), "arguments": facts, **machine()}
            print(integration_table.line(f"{host}, {feature}", rows[feature]), flush=True)
    return {"version": version_of(host), "rows": rows}


def version_of(host: str) -> str:
    """A checkout on PYTHONPATH has no metadata."""
    try:
        return version(HOSTS[host][1])
    except PackageNotFoundError:
        return "(checkout)"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n", 1024), ("d", 1152), ("d-sae", 65536), ("l0", 64), ("repeats", 3)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--host", choices=HOSTS, action="append", help="default: all")
    made.add_argument("--feature", help="one row only")
    made.add_argument("--json", type=Path, help="put the rows into this file, keeping others")
    made.add_argument("--tables", action="store_true", help="rewrite the documentation's from it")
    made.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.contender:
        serve(args)
        return
    for host in args.host or HOSTS:
        if find_spec(HOSTS[host][0]) is None:
            print(f"{host}: NOT MEASURED, {HOSTS[host][1]} is not installed", flush=True)
            continue
        found = measured(args, host)
        if args.json:
            integration_table.merge(args.json, host, found)
    if args.tables:
        integration_table.rewrite(json.loads(args.json.read_text()))


if __name__ == "__main__":
    main()
