"""Numbers that change over a run, each a function of the step alone, so that resuming is exact."""

from __future__ import annotations

import math


def warmup(step: int, steps: int, start: float, shape: str) -> float:
    """Factor that rises from `start` at step 0 to 1 at step `steps`.

        linear: start + (1 - start) u;  cosine: start + (1 - start) (1 - cos(pi u)) / 2

    with `u = min(step / steps, 1)`.

    Args:
        step: >= 0.
        steps: length, >= 0; 0 is no warm-up.
        start: factor at step 0, in [0, 1].
        shape: "linear" or "cosine".

    Returns:
        The factor, in [start, 1].
    """
    u = min(step / steps, 1.0) if steps > 0 else 1.0
    if shape == "cosine":
        u = (1 - math.cos(math.pi * u)) / 2
    return start + (1 - start) * u


def decay(step: int, steps: int, fraction: float) -> float:
    """Factor that is 1 until the last `fraction` of the run and falls linearly towards 0 there."""
    length = steps * fraction
    return min((steps - step) / length, 1.0) if length > 0 else 1.0


def glide(step: int, steps: int, start: float, end: float) -> float:
    """Straight line from `start` at step 0 to `end` at step `steps`, which it keeps."""
    return end + (start - end) * max(1 - step / steps, 0.0) if steps > 0 else end
