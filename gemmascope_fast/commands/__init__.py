"""The sub-commands that work on artefacts: `convert`, `inspect`, `encode`.

Each has a `main(argv)` that returns the exit code: 0, or 1 when a check failed, or 2 with one line
on the standard error when the arguments or what they name cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

ERRORS = (FileNotFoundError, ImportError, OSError, RuntimeError, TypeError, ValueError)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what it cannot use becomes a line and the exit code 2."""
    try:
        return command()
    except ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
