"""`backend=` of `load`: which implementation must serve a module's ops."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops

OPS = ("jumprelu_encode", "decode")


def check_backend(backend: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless `backend` serves weights of `dtype` on `device` in this process.

    The implementation is chosen when the package is imported, for all modules at once; a module
    that asks for one gets it or an error, never another.

    Raises:
        ValueError: another implementation serves, or there is none of that name.
    """
    if backend is None:
        return
    if backend not in ops.BACKENDS:
        names = ", ".join(ops.BACKENDS)
        raise ValueError(f"load: backend must be None or one of {names}, got {backend!r}")
    for op in OPS:
        serving = "reference"
        if dtype != torch.float64 and device.type in ("cpu", "cuda"):
            serving = ops.implementation(op, device.type)
        if serving != backend:
            raise ValueError(
                f"load: backend={backend!r} does not serve {op} of {dtype} on {device.type} in "
                f"this process, {serving} does: set GEMMASCOPE_FAST_BACKEND={backend} before the "
                "import; `python -m gemmascope_fast doctor` says why"
            )
