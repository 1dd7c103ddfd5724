"""Parts `tests` and `sanitizer`: the test suite on the device, and compute-sanitizer's four tools.

Each test module is a row of its own, run by its own interpreter; some run side by side, since most
of their time is compilation on the CPU. A module whose imports are missing here is told so.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .context import ROOT, Context, Skip
from .machine import tool

MODULE_SECONDS = 240
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPTIONAL = ("hypothesis", "transformers", "huggingface_hub", "matplotlib", "rich", "numpy")
OWN_DEVICE = "GEMMASCOPE_FAST_TEST_DEVICE"
"""Modules without the fixture that read it choose the device themselves, or take another's."""
NO_TESTS = 5
"""pytest's exit status when the selection is empty."""


# ---- tests


def tests(ctx: Context) -> None:
    """Modules that take the `backend` fixture or choose the device themselves."""
    modules = device_modules(ROOT / "tests")
    if ctx.settings.quick:
        modules = [m for m in modules if m.name == "test_by_feature.py"]
    workers = 1 if ctx.settings.quick else max(1, min(16, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(ctx.row, m.name, lambda m=m: _module(ctx, m), 10) for m in modules]
    for job in jobs:
        job.result()


def device_modules(folder: Path) -> list[Path]:
    """Test modules that run on the device, longest first, so that they end together."""
    found = [p for p in folder.glob("test_*.py") if "backend" in _arguments(p) or _chooses(p)]
    return sorted(found, key=lambda p: (-p.stat().st_size, p.name))


def missing_imports(module: Path) -> list[str]:
    """Optional packages that a module imports at its top and this machine lacks."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    absent = [n for n in sorted(names & set(OPTIONAL)) if importlib.util.find_spec(n) is None]
    return absent


def _arguments(module: Path) -> set[str]:
    functions = [
        n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.FunctionDef)
    ]
    return {a.arg for f in functions if f.name.startswith("test_") for a in f.args.args}


def _chooses(module: Path) -> bool:
    text = module.read_text()
    taken = re.search(r"^from test_\w+ import .*\bDEVICE\b", text, flags=re.M)
    return taken is not None or f'environ.get("{OWN_DEVICE}"' in text


def _module(ctx: Context, module: Path) -> dict[str, Any]:
    absent = missing_imports(module)
    if absent:
        raise Skip(f"not collected: {', '.join(absent)} not installed")
    if _chooses(module) and ctx.settings.device == "cpu":
        raise Skip("kernels of a GPU")
    env = {**os.environ, OWN_DEVICE: ctx.settings.device, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", str(module), "-q"]
    command += ["-p", "no:cacheprovider", "--tb=short"]
    command += [] if _chooses(module) else ["-k", "device"]
    limit = max(1.0, min(MODULE_SECONDS, ctx.remaining() - 5))
    code, text = run(command, env, limit)
    return outcome(code, text, limit)


def outcome(code: int | None, text: str, limit_s: float) -> dict[str, Any]:
    """A row from pytest's exit status and output."""
    tail = "\n".join(text.splitlines()[-60:])
    if code is None:
        return {"status": "failed", "reason": f"longer than {limit_s:.0f} s\n{tail}"}
    if code == NO_TESTS:
        raise Skip("no test of it runs on a device")
    summary = next((t for t in reversed(text.splitlines()) if re.search(r"\d+ \w+.* in ", t)), "")
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
    }
    row: dict[str, Any] = {"counts": counts, "line": summary.strip(" =")}
    if code:
        first = summary.strip(" =") or f"pytest ended with {code}"
        row |= {"status": "failed", "reason": f"{first}\n{tail}"}
    elif counts.get("skipped"):
        row["skips"] = sorted(set(re.findall(r"^SKIPPED \[\d+\] (.*)$", text, flags=re.M)))[:20]
    return row


# ---- sanitizer


def sanitizer(ctx: Context) -> None:
    """Every op at small shapes under each tool."""
    for name in SANITIZER_TOOLS:
        ctx.row(name, lambda name=name: _sanitize(ctx, name), 10)


def _sanitize(ctx: Context, name: str) -> dict[str, Any]:
    if ctx.settings.device == "cpu":
        raise Skip("compute-sanitizer checks GPU code")
    program = tool("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    script = Path(__file__).with_name("sanitized.py")
    options = ["--tool", name, "--error-exitcode", "86", "--print-limit", "20"]
    # every allocation is one of the driver's own, so that its end is known to the tool
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    share = ctx.remaining() / (len(SANITIZER_TOOLS) - SANITIZER_TOOLS.index(name))
    command = [program, *options, sys.executable, str(script), ctx.settings.device]
    limit = max(1.0, share - 3)
    code, text = run(command, env, limit)
    return sanitized(code, text, limit)


def sanitized(code: int | None, text: str, limit_s: float) -> dict[str, Any]:
    """A row from the tool's exit status and output; names the kernels that it blames."""
    tail = "\n".join(text.splitlines()[-60:])
    done = re.findall(r"^done: (.*)$", text, flags=re.M)
    if code is None:
        told = f"longer than {limit_s:.0f} s, after {len(done)} calls\n{tail}"
        return {"status": "failed", "reason": told, "calls": done}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    blamed = sorted(set(re.findall(r"=========     at (?:0x\w+ in )?([\w:~<>]+)", text)))
    row: dict[str, Any] = {"calls": done, "blamed": blamed, "line": "; ".join(summary[-2:])}
    if code:
        what = f"{row['line'] or f'ended with {code}'}, in {', '.join(blamed) or 'no kernel'}"
        row |= {"status": "failed", "reason": f"{what}\n{tail}"}
    elif not summary:
        row |= {"status": "failed", "reason": f"the tool printed no summary\n{tail}"}
    return row


def run(command: list[str], env: dict[str, str], limit_s: float) -> tuple[int | None, str]:
    """Exit status (None when the time was up) and merged output of a command."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        return None, f"{text}\nstopped after {time.monotonic() - began:.0f} s"
    return process.returncode, text
