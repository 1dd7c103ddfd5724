"""The Triton kernels as contenders, where compiled CUDA kernels serve the ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from gemmascope_fast import ops, triton_launchers

TRITON = "ours, Triton"


def triton_of(name: str, device: torch.device) -> Callable[..., Any] | str:
    """What `kernels/` has for op `name`, or why it is no contender here."""
    if device.type != "cuda":
        return "kernels of a GPU"
    if ops.implementation(name, "cuda") != "native":
        return "serves the op already"
    if not triton_launchers.FOUND:
        return "triton is not installed"
    module = importlib.import_module(f"gemmascope_fast.kernels.{name.rstrip('_')}")
    kernel: Callable[..., Any] = getattr(module, name)
    return kernel


def call_of(name: str, device: torch.device, *args: Any) -> Callable[[], object] | str:
    """The same as a contender."""
    kernel = triton_of(name, device)
    return kernel if isinstance(kernel, str) else lambda: kernel(*args)
