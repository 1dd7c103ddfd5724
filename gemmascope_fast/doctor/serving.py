"""Which implementation serves an op on a device type, and why not another."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops, triton_launchers
from . import machine
from .self_testing import self_test

DEVICES = ("cpu", "cuda")
IMPLEMENTATIONS = ("native", "triton", "reference")


def device_missing(device: str) -> str:
    """Why tensors cannot live on a device type here; empty when they can."""
    if device == "cpu" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA device"


def why_not(name: str, device: str, implementation: str) -> str:
    """Why `implementation` does not serve op `name` on a device type; empty when it does."""
    serving = ops.implementation(name, device)
    if (missing := device_missing(device)) or implementation == serving:
        return missing
    if ops.BACKEND and ops.BACKEND != implementation:
        return f"GEMMASCOPE_FAST_BACKEND={ops.BACKEND}"
    if implementation == "native":
        return ops.NATIVE_MISSING or _why_not_native(device)
    if implementation == "triton":
        return _why_not_triton(device)
    return f"{serving} is faster"


def _why_not_native(device: str) -> str:
    build = machine.build_info()
    if device == "cuda" and build is not None and not build["cuda_archs"]:
        return "the compiled library was built without CUDA"
    return f"the compiled library has no {device} implementation"


def _why_not_triton(device: str) -> str:
    if device == "cpu":
        return "Triton kernels need a GPU"
    return "native is faster" if triton_launchers.FOUND else "triton is not installed"


def served(name: str, device: str) -> dict[str, Any]:
    """Implementation and self-test of op `name`, and why the others do not serve."""
    reasons = {i: why_not(name, device, i) for i in IMPLEMENTATIONS}
    serving = next((i for i, reason in reasons.items() if not reason), "none")
    tested = "" if device_missing(device) else self_test(name, device)
    return {
        "implementation": serving,
        "self_test": tested,
        "why_not": {i: reason for i, reason in reasons.items() if reason},
    }
