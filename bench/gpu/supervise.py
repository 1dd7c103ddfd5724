"""Runs parts, each in a process of its own with a time limit, and closes them in the results."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from .context import Context, Settings, commit
from .machine import CLOCKS, smi
from .state import Results

LIMIT_S = 460.0
GRACE_S = 15.0
"""Beyond a part's own limit before its process is killed: imports, and the row in progress."""

PARTS: dict[str, str] = {
    "environment": "machine",
    "build": "machine",
    "smoke": "smoke",
    "tests": "suite",
    "sanitizer": "suite",
    "ceilings": "encoders",
    "encode": "encoders",
    "screened": "encoders",
    "topk": "selecting",
    "few": "few",
    "decode": "passes",
    "backward": "passes",
    "step": "steps",
    "momentum": "momentum",
    "sparsify": "peers",
    "handover": "few",
    "train_1m": "train",
    "distributed": "distributed",
}
"""Part and the module whose function of that name it is, in the order of a run of all."""

Start = Callable[[str, float], list[str]]
"""Builds the command of a part from its name and its limit."""


def work(part: str, settings: Settings, path: Path, limit_s: float) -> None:
    """Measure a part in this process: what the command of `run_part` comes to."""
    results = Results(path, settings.quick)
    ctx = Context(part, settings, results, limit_s)
    getattr(import_module(f".{PARTS[part]}", __package__), part)(ctx)
    if settings.device == "cuda":  # still warm: the clocks that the rows above were measured at
        results.data.setdefault("clocks", {})[part] = smi(*CLOCKS)
        results.save()


def run_part(part: str, path: Path, quick: bool, start: Start, limit_s: float = LIMIT_S) -> str:
    """Run a part to its end or its limit; returns its status, which the results then hold."""
    began = time.monotonic()
    entry = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    Results(path, quick).save()
    code, tail = stream(start(part, limit_s), limit_s + GRACE_S)
    results = Results(path, quick)
    status, reason = results.verdict(part), ""
    if code is None:
        status, reason = "incomplete", f"stopped after {limit_s + GRACE_S:.0f} s"
    elif code:
        status, reason = "failed", f"exit status {code}: {' | '.join(tail[-3:])}"
    if status != "done" and tail:
        entry["tail"] = "\n".join(tail)
    seconds = time.monotonic() - began
    results.end_part(part, status=status, reason=reason, seconds=seconds, commit=commit(), **entry)
    return status


def stream(command: list[str], limit_s: float) -> tuple[int | None, list[str]]:
    """Print a command's output as it comes; exit status (None past the limit) and last lines."""
    process = subprocess.Popen(
        command,
        **{"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # so that what it started ends with it
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(limit_s, stop)
    timer.start()
    tail: deque[str] = deque(maxlen=40)
    try:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            tail.append(text.rstrip())
        process.wait()
    finally:
        timer.cancel()
        _end(process)
    return (None if late.is_set() else process.returncode), list(tail)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process and its children: they are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def command_of(program: Path, settings: Settings, path: Path) -> Start:
    """Starts parts by calling `program` again."""
    options = ["--device", settings.device, "--state", str(path)]
    options += ["--quick"] if settings.quick else []
    options += ["--brief"] if settings.brief else []
    for name, chosen in (("--latents", settings.only_latents), ("--l0s", settings.only_l0s)):
        options += [name, ",".join(map(str, chosen))] if chosen else []

    def start(part: str, limit_s: float) -> list[str]:
        return [sys.executable, str(program), *options, "--worker", part, "--limit", str(limit_s)]

    return start
