"""The Triton kernels as implementations of ops: imported, and tuned if asked, at the first call."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOUND = importlib.util.find_spec("triton") is not None
"""Triton is installed."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton would run kernels in its interpreter, on CPU tensors."""

TUNE = os.environ.get("GEMMASCOPE_FAST_TUNE") == "1"
"""Measure configurations at the first call with a new shape class."""


RATES = (
    "TERAFLOPS_16",
    "TERAFLOPS_32",
    "GIGABYTES",
    "NATIVE_TOKEN_GIGABYTES",
    "NATIVE_LATENT_GIGABYTES",
)
"""What `csrc/common/dense_work.h` weighs passes and products by, per architecture."""


def dense_rates() -> list[float]:
    """Rows of `configs/dense.json` as (architecture, *RATES) in one list; the default is 0."""
    path = Path(__file__).parent / "kernels" / "configs" / "dense.json"
    targets = {
        name.removeprefix("sm_"): rows for name, rows in json.loads(path.read_text()).items()
    }
    numbers: list[float] = []
    for name, rows in targets.items():
        architecture = 0.0 if name == "default" else float(name)
        numbers += [architecture, *(float(rows[0]["config"][rate]) for rate in RATES)]
    return numbers


def _writes(name: str) -> bool:
    return bool(getattr(torch.ops.gemmascope_fast, name).default._schema.is_mutable)


def launcher(name: str) -> Callable[..., Any] | None:
    """What serves op `name`, of `kernels/<op>.py`; None where there is no such file."""
    stem = name.rstrip("_")  # an in-place op lives beside the op it repeats
    if not (Path(__file__).parent / "kernels" / f"{stem}.py").exists():
        return None

    def run(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        launch = getattr(importlib.import_module(f"{__package__}.kernels.{stem}"), name)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            if TUNE and not _writes(name):  # an op that changes its arguments runs once
                tuning = importlib.import_module(f"{__package__}.kernels.tuning")
                tuning.tune(lambda: launch(*args), device)
            return launch(*args)

    return run
