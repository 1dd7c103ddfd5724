"""Other SAE libraries with and without this backend: time and transient memory of the same calls.

    python bench/bench_integrations.py [--host saelens] [--n 1024 --d 1152 --d-sae 65536 --l0 64]

Each row is one call of a host library, with its own classes and trainer, in two processes that
alternate: as the host ships it, and with the backend installed. Before anything is timed both do
the call once and their results must agree. Medians of `--repeats` calls; glibc's malloc keeps freed
blocks while they are timed, so that no contender pays for page faults. Memory: growth of the
resident set during a second call, in a process of its own (malloc as it comes); of a training step,
during forward and backward, less the gradients of the weights: what activations take.

A host is a module beside this one, `integration_<host>.py`, with

    FEATURES  {name: make}, make(args) -> a call that returns numbers to compare; with `args.peak`,
              the call whose memory is measured, and the bytes to leave out as its `gradients`
    install() the backend for the whole process
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory import keep_freed_memory, memory_of

HOSTS = {
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "circuit_tracer": "circuit-tracer",
}
SIZES = ("n", "d", "d_sae", "l0")
CONTENDERS = ("stock", "backend")
TOLERANCE = 1e-3
"""Of the numbers that a call returns; a loss whose gates rounding decides."""


def machine() -> dict[str, Any]:
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {"machine": platform.machine(), "capability": capability, "threads": threads}


def call_of(args: argparse.Namespace) -> Any:
    host = importlib.import_module(f"integration_{args.host}")
    torch.manual_seed(0)
    if args.contender == "backend":
        host.install()
    return host.FEATURES[args.feature](args)


def serve(args: argparse.Namespace) -> None:
    """In a process of its own: do the call at every line of the input, print what it took."""
    with contextlib.redirect_stdout(sys.stderr):  # what hosts print
        call = call_of(args)
    if args.peak:
        call()
        print((memory_of(lambda _: call()).peak - getattr(call, "gradients", 0)) / 2**20)
        return
    keep_freed_memory(True)
    for _ in sys.stdin:
        start = time.perf_counter()
        numbers = call()
        taken = 1e3 * (time.perf_counter() - start)
        print(json.dumps({"ms": taken, "numbers": numbers}), flush=True)


def command(args: argparse.Namespace, feature: str, contender: str, *flags: str) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
    chosen = [f"--host={args.host}", f"--feature={feature}", f"--contender={contender}"]
    return [sys.executable, __file__, *sizes, *chosen, *flags]


def alternating(args: argparse.Namespace, feature: str) -> Iterator[dict[str, Any]]:
    """Results of both contenders' calls, the first included, in turns."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {c: subprocess.Popen(command(args, feature, c), **pipes) for c in CONTENDERS}
    try:
        for _ in range(1 + args.repeats):
            found = {}
            for contender, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                found[contender] = json.loads(process.stdout.readline())
            yield found
    finally:
        for process in running.values():
            process.stdin.close()
            process.wait()


def peak(args: argparse.Namespace, feature: str, contender: str) -> float:
    done = subprocess.run(
        command(args, feature, contender, "--peak"), capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def row(args: argparse.Namespace, feature: str) -> dict[str, Any]:
    """One feature: agreement, medians and peaks."""
    results = list(alternating(args, feature))
    first, worst = results[0], 0.0
    for name, value in first["stock"]["numbers"].items():
        off = abs(first["backend"]["numbers"][name] / value - 1)
        assert off <= TOLERANCE, f"{feature}: {name} differs by {off:.2g}"
        worst = max(worst, off)
    found: dict[str, Any] = {"agree_within": worst}
    for contender in CONTENDERS:
        times = [result[contender]["ms"] for result in results[1:]]
        found[contender] = {"ms": times, "median_ms": statistics.median(times)}
        if not args.no_peak:
            found[contender]["peak_mib"] = peak(args, feature, contender)
    found["speedup"] = found["stock"]["median_ms"] / found["backend"]["median_ms"]
    return found


def line(feature: str, found: dict[str, Any]) -> str:
    stock, ours = found["stock"], found["backend"]
    text = f"{feature:28} {stock['median_ms']:7.0f} ms -> {ours['median_ms']:6.0f} ms"
    text += f"  {found['speedup']:5.1f}x"
    if "peak_mib" in stock:
        text += f"   {stock['peak_mib']:6.0f} MiB -> {ours['peak_mib']:5.0f} MiB"
    return text


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n", 1024), ("d", 1152), ("d-sae", 65536), ("l0", 64), ("repeats", 3)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--host", choices=HOSTS, default=next(iter(HOSTS)))
    made.add_argument("--feature", help="one row only")
    made.add_argument("--json", type=Path)
    made.add_argument("--no-peak", action="store_true", help="leave the memory out")
    made.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.contender:
        serve(args)
        return
    host = importlib.import_module(f"integration_{args.host}")
    facts = {name: getattr(args, name) for name in (*SIZES, "repeats")}
    report: dict[str, Any] = {"machine": machine(), "host": args.host, "arguments": facts}
    report |= {"version": version(HOSTS[args.host]), "torch": torch.__version__}
    for feature in [args.feature] if args.feature else host.FEATURES:
        report[feature] = row(args, feature)
        print(line(feature, report[feature]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
