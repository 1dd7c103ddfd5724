"""How every kernel is launched: its configuration from a table, and one place to observe launches.

`configs/<kernel>.json` holds block sizes, warps and stages per device and shape; the nearest shape
serves (distance: sum of |log ratio| over the dimensions), so that nothing is tuned while a program
runs. `tuning.py` measures new rows when asked to.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""

COMPILE_TARGET: str | None = None
"""Target of tensors without a device of their own (`meta`), as "sm_90"; set to compile only."""

OVERRIDE: Callable[[str, dict[str, int], dict[str, int]], dict[str, int]] | None = None
"""`(kernel, shape, config of the table) -> config to use`; set by `tuning.py` while it measures."""

TUNED = Path(
    os.environ.get("GEMMASCOPE_FAST_CONFIGS")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemmascope_fast/configs"
)
"""Folder of rows measured on this machine; they come before those of the package."""


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run `kernel` on a 1-D grid; an empty grid is no launch.

    Args:
        kernel: a `@triton.jit` function.
        programs: size of the grid, below 2^31.
        args: its arguments up to the constexpr ones.
        options: constexpr arguments, `num_warps`, `num_stages`.
    """
    if programs >= 2**31:
        raise ValueError(
            f"{kernel.__name__}: {programs} programs exceed the largest grid, 2^31 - 1"
        )
    if programs > 0:
        _run(kernel, programs, args, options)


def _run(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[(programs,)](*args, **options)


def choose(name: str, device: torch.device, **shape: int) -> dict[str, int]:
    """Constexpr blocks, `num_warps` and `num_stages` of kernel `name` for a device and a shape."""
    config = dict(_nearest(name, target(device), tuple(shape.items())))
    return config if OVERRIDE is None else OVERRIDE(name, shape, config)


def target(device: torch.device) -> str:
    """Name of a device's architecture: "sm_90", "gfx942", or "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    if device.type == "meta":
        assert COMPILE_TARGET is not None, "meta tensors are for compiling only"
        return COMPILE_TARGET
    return _device_target(device.index or 0)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device: how many programs run at once, up to occupancy."""
    if device.type != "cuda":
        return 2 if device.type == "cpu" else 132
    return _processors(device.index or 0)


def dot_precision(*operands: Tensor) -> str:
    """`input_precision` of `tl.dot`: full float32 unless torch was told to use TF32.

    Follows `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul.fp32_precision`,
    whose older getter raises once the newer one was set; 16-bit products are not affected.
    """
    wide = any(t.dtype == torch.float32 for t in operands)
    return "tf32" if wide and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block(size: int, largest: int, smallest: int = 1) -> int:
    """The power of two that covers `size`, within bounds."""
    return max(smallest, min(largest, triton.next_power_of_2(max(size, 1))))


@functools.cache
def _device_target(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def table(name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of one kernel: `{target: [{"shape": {...}, "config": {...}}]}`."""
    path = Path(__file__).parent / "configs" / f"{name}.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    tuned = TUNED / f"{name}.json"
    if tuned.exists():
        names = {frozenset(row["config"]) for rows in found.values() for row in rows}
        for arch, rows in json.loads(tuned.read_text()).items():
            usable = [row for row in rows if frozenset(row["config"]) in names]
            found[arch] = usable + _rows(found, arch)
    return found


@functools.cache
def _nearest(name: str, arch: str, shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    rows = _rows(table(name), arch)
    nearest = min(rows, key=lambda row: _distance(row["shape"], dict(shape)))
    config: dict[str, int] = nearest["config"]
    return config


def _rows(targets: dict[str, list[dict[str, Any]]], arch: str) -> list[dict[str, Any]]:
    """Rows of the target itself, of the newest older NVIDIA one, or the default ones."""
    if arch in targets or not arch.startswith("sm_"):
        return targets.get(arch, targets["default"])
    older = [t for t in targets if t.startswith("sm_") and int(t[3:]) <= int(arch[3:])]
    return targets[max(older, key=lambda t: int(t[3:]))] if older else targets["default"]


def _distance(row: dict[str, int], shape: dict[str, int]) -> float:
    return sum(abs(math.log(max(shape[k], 1) / max(v, 1))) for k, v in row.items() if k in shape)
