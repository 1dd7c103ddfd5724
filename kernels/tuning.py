"""Measures better rows for `configs/`, when `GEMMASCOPE_FAST_TUNE=1` asks for it.

For every kernel that one call of an op launches: each number of its configuration halved and
doubled in turn, the whole call timed, the fastest kept, until nothing improves. A row is measured
once per machine and shape class (sizes rounded to powers of two) and kept in `launching.TUNED`.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import launching

Config = dict[str, int]
Shape = dict[str, int]

GAIN = 0.97
"""A change must be at least 3 % faster to be kept: less is noise."""

_lock = threading.Lock()
_done: set[tuple[str, str, tuple[tuple[str, int], ...]]] = set()


def tune(run: Callable[[], Any], device: torch.device) -> None:
    """Tune every kernel that `run` launches on `device` and that has no row of this shape yet.

    Args:
        run: calls one op; called many times, so it must not change what it reads.
        device: where its tensors are.
    """
    with _lock:
        for name, (shape, config) in _chosen(run).items():
            key = (name, launching.target(device), tuple(shape_class(shape).items()))
            if key in _done or _has_row(*key):
                continue
            _done.add(key)
            best = descend(config, lambda c, name=name: _time(run, device, {name: c}))
            if best != config:
                _save(name, key[1], {"shape": dict(key[2]), "config": best})


def shape_class(shape: Shape) -> Shape:
    """Sizes rounded up to powers of two."""
    return {k: 1 << max(v - 1, 0).bit_length() for k, v in shape.items()}


def descend(config: Config, measure: Callable[[Config], float]) -> Config:
    """Coordinate descent from `config`: `measure` returns seconds, infinity where it cannot run."""
    best, fastest = config, measure(config)
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            seconds = measure(candidate)
            if seconds < GAIN * fastest:
                best, fastest, improved = candidate, seconds, True
    return best


def neighbours(config: Config) -> Iterator[Config]:
    """One number changed at a time: stages by one, everything else by a factor of two."""
    for key, value in config.items():
        steps = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        for changed in steps:
            if changed > 0 and not (key == "num_warps" and changed > 16):
                yield {**config, key: changed}


def _chosen(run: Callable[[], Any]) -> dict[str, tuple[Shape, Config]]:
    """Shape and configuration of every kernel that `run` asks for."""
    asked: dict[str, tuple[Shape, Config]] = {}

    def note(name: str, shape: Shape, config: Config) -> Config:
        asked.setdefault(name, (shape, config))
        return config

    _with_override(note, run)
    return asked


def _time(run: Callable[[], Any], device: torch.device, replaced: dict[str, Config]) -> float:
    """Median seconds of five calls after two; infinity when the configuration cannot run."""

    def override(name: str, shape: Shape, config: Config) -> Config:
        return replaced.get(name, config)

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def measure() -> float:
        return statistics.median([once() for _ in range(7)][2:])

    try:
        return float(_with_override(override, measure))
    except Exception as error:  # too much shared memory, a block the kernel refuses: no candidate
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return float("inf")


def _with_override(override: Callable[..., Config], run: Callable[[], Any]) -> Any:
    launching.OVERRIDE = override
    try:
        return run()
    finally:
        launching.OVERRIDE = None


def _has_row(name: str, arch: str, shape: tuple[tuple[str, int], ...]) -> bool:
    path = launching.TUNED / f"{name}.json"
    rows = json.loads(path.read_text()).get(arch, []) if path.exists() else []
    return any(row["shape"] == dict(shape) for row in rows)


def _save(name: str, arch: str, row: dict[str, Any]) -> None:
    """Add a row to the folder of this machine; written whole, then renamed."""
    launching.TUNED.mkdir(parents=True, exist_ok=True)
    path = launching.TUNED / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows.setdefault(arch, []).insert(0, row)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)
    launching.table.cache_clear()
    launching._nearest.cache_clear()
