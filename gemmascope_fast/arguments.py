"""Checks of single numbers: each message names op, argument, expectation and actual."""

from __future__ import annotations

import math
from typing import Any

import torch

INT64_END = 2**63


def check_number(op: str, name: str, value: Any, *, positive: bool = False) -> float:
    """Return `value`, a finite int or float >= 0 (> 0 when `positive`), as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf or (positive and number == 0):
        raise ValueError(
            f"{op}: {name} must be finite and {'>' if positive else '>='} 0, got {value}"
        )
    return number


def check_count(
    op: str, name: str, value: Any, limit: Any = None, limit_name: str = "", kind: str = "an int"
) -> Any:
    """Return `value`, an int (or traced int) >= 0 and, with a limit, not above it."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}")
    if limit is not None and not 0 <= value <= limit:
        raise ValueError(f"{op}: {name} must be in [0, {limit_name}={limit}], got {value}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    if isinstance(value, int) and value >= INT64_END:
        raise ValueError(f"{op}: {name} must be below 2^63, got {value}")
    return value
