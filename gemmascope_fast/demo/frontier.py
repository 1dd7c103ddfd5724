"""Reconstruction against sparsity: the same dictionary trained to several targets of L0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..training.metrics import evaluate
from ..training.runs import train
from .activations import Activations, Progress
from .recipe import preset
from .settings import Settings


@dataclass(frozen=True)
class Point:
    """One trained dictionary.

    Attributes:
        target: L0 it was pulled to.
        l0, l0_std, fvu, cosine: on held-out tokens; `l0_std` over the tokens.
        dead: latents that fire on no token, held-out ones included.
    """

    target: float
    l0: float
    l0_std: float
    fvu: float
    cosine: float
    dead: int


COLUMNS = ("held-out FVU", "L0", "spread of L0", "cosine", "never fired")


def frontier(source: Activations, settings: Settings, own: Any, progress: Progress) -> list[Point]:
    """Train to `settings.other_targets` and compare with `own`, trained to `settings.target_l0`.

    Args:
        source: raw activations.
        settings: of the runs.
        own: the SAE of the main run.
        progress: called with the steps done.
    """
    held = source.held_out
    points = [_point(own, settings.target_l0, source)]
    total = settings.steps * len(settings.other_targets)
    for number, target in enumerate(settings.other_targets):
        done = number * settings.steps

        def note(metrics: dict[str, float], done: int = done, target: float = target) -> None:
            progress(done + int(metrics["step"]), total, f"target {target:g}")

        sae = train(
            source.x[~held],
            d_sae=settings.d_sae,
            target_l0=target,
            init_l0=settings.initial_l0 * target / settings.target_l0,
            steps=settings.steps,
            batch_size=settings.batch,
            preset=preset(settings),
            seed=settings.seed,
            on_metrics=note,
            progress=False,
        )
        points.append(_point(sae, target, source))
    return sorted(points, key=lambda point: point.target)


def rows(points: Sequence[Point]) -> list[list[str]]:
    """Rows of a table: the target, then `COLUMNS`."""
    return [
        [
            f"target {point.target:g}",
            f"{point.fvu:.4f}",
            f"{point.l0:.1f}",
            f"{point.l0_std:.1f}",
            f"{point.cosine:.3f}",
            f"{point.dead:,}",
        ]
        for point in points
    ]


def _point(sae: Any, target: float, source: Activations) -> Point:
    found = evaluate(sae, source.x[source.held_out])
    dead = evaluate(sae, source.x).dead
    return Point(target, found.l0, found.l0_std, found.fvu, found.cosine, dead)
