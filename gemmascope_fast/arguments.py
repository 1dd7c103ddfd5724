"""Checks of single numbers: each message names op, argument, expectation and actual."""

from __future__ import annotations

import math
from typing import Any

import torch

INT64_END = 2**63


def check_number(
    op: str, name: str, value: Any, *, positive: bool = False, negative: bool = False
) -> float:
    """Return `value`, a finite int or float >= 0, as a float.

    Where it has to be `positive`, > 0; where it may be `negative`, any.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = negative or number > 0 or (number == 0 and not positive)
    if not (inside and math.isfinite(number)):
        wanted = "finite" if negative else f"finite and {'>' if positive else '>='} 0"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")
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
