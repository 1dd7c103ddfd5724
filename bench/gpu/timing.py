"""Times of several contenders on the same inputs: interleaved, cold cache, medians, peak memory.

On a GPU each call lies between two CUDA events behind a millisecond of writes to twice the L2
cache: they empty it, and meanwhile the host queues the call's kernels, as it does in a run that is
ahead of its device. A call that waits for the device shows what it waits.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .context import Fatal

ROUNDS = (3, 25)
"""Fewest and most repetitions of a contender."""

LEAD_FILLS = 32
"""Writes of twice the L2 before a call: 1.3 ms on an H200, of which the host takes a part to queue
them. Launching our ops takes it 0.1 to 0.2 ms, what makes more launches shows through."""

Call = Callable[[], object]


class Stopwatch:
    """Seconds and extra memory of single calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def seconds(self, call: Call) -> float:
        """Duration of one call, its result dropped."""
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(LEAD_FILLS):
            self._flush.fill_(1)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_extra_bytes(self, call: Call) -> int | None:
        """Most memory that the call held at once, results included; None on a CPU."""
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def compare(
    contenders: Mapping[str, Call | str], device: torch.device, budget_s: float
) -> dict[str, dict[str, Any]]:
    """Time every contender within about `budget_s` seconds; a text says why one is left out.

    Returns:
        Per contender `{"median_s", "min_s", "max_s", "rounds", "peak_extra_bytes"}`, or
        `{"unavailable": reason}`.
    """
    watch = Stopwatch(device)
    found: dict[str, dict[str, Any]] = {}
    once: dict[str, float] = {}
    for name, call in contenders.items():
        if isinstance(call, str):
            found[name] = {"unavailable": call}
            continue
        found[name] = _attempt(lambda call=call: _warm(watch, call), device)
        if "unavailable" not in found[name]:
            once[name] = found[name].pop("once_s")
    rounds = int(budget_s / max(sum(once.values()), 1e-9))
    rounds = max(ROUNDS[0], min(ROUNDS[1], rounds))
    samples: dict[str, list[float]] = {name: [] for name in once}
    for turn in range(rounds):
        for name in _rotated(list(samples), turn):
            call = contenders[name]
            taken = _attempt(lambda call=call: {"s": watch.seconds(call)}, device)
            if "unavailable" in taken:
                found[name] = taken
                del samples[name]
            else:
                samples[name].append(taken["s"])
    for name, taken in samples.items():
        found[name] |= summarise(taken)
    return found


def summarise(seconds: list[float]) -> dict[str, float]:
    """Median and spread of repeated times."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(seconds),
    }


def _warm(watch: Stopwatch, call: Call) -> dict[str, Any]:
    """First call (it compiles), a second for the memory, a third for its time."""
    call()
    peak = watch.peak_extra_bytes(call)
    return {"peak_extra_bytes": peak, "once_s": watch.seconds(call)}


def _attempt(act: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What `act` returns, or why a contender cannot be measured; memory is given back."""
    try:
        return act()
    except Exception as error:
        reason = unavailable(error)
    free(device)
    alive(device)
    return {"unavailable": reason}


def unavailable(error: Exception) -> str:
    """Out of memory is a finding about a contender; other errors are told by their first line."""
    text = str(error).strip() or type(error).__name__
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if memory or "ALLOC_FAILED" in text or "can't allocate memory" in text:
        return "does not fit"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def or_reason(reason: str, make: Any) -> Any:
    """What `make` returns, or why it cannot be had: `reason`, or what it raised."""
    if reason:
        return reason
    try:
        return make()
    except Exception as error:
        return unavailable(error)


def free(device: torch.device) -> None:
    """Return cached memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def alive(device: torch.device) -> None:
    """Raise when an earlier kernel broke the context: nothing later would be true."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise Fatal(f"the device stopped answering: {error}") from error


def copy_rate(device: torch.device, bytes_: int) -> float:
    """Bytes per second of a device-to-device copy, read plus written: the floor of memory."""
    source = torch.randint(-100, 100, (bytes_,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    watch = Stopwatch(device)
    times = [watch.seconds(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * bytes_ / statistics.median(times[2:])


def _rotated(names: list[str], turn: int) -> list[str]:
    at = turn % max(len(names), 1)
    return names[at:] + names[:at]
