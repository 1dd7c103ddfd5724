"""Where x and its target are read in a model: one hook point, or one per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hook_points import BRACES, Place, collapse, expand, resolve

OP = "train"
ARGUMENTS = ("hook_point", "target_hook_point")


@dataclass(frozen=True)
class LayerPoints:
    """Hook points of x and, where there is one, of the target.

    Attributes:
        sides: hook points of x and of the target, each one per layer.
        places: of all of them in the model, those of x first.
        names: how a config writes each side; None where braces cannot say it.
        layers: L where several can be named, by braces or a sequence; None of a single name.
    """

    sides: list[list[str]]
    places: list[Place]
    names: list[str | None]
    layers: int | None

    @property
    def every(self) -> list[str]:
        """All hook points, those of x first."""
        return sum(self.sides, [])

    def rows(self, found: list[Tensor]) -> list[Tensor]:
        """`[..., L * d]` of each side, from `[..., d]` at every hook point.

        Raises:
            ValueError: layers differ in width.
        """
        if self.layers is None:
            return found
        widths = [t.shape[-1] for t in found]
        if len(set(widths)) > 1:
            pairs = zip(self.every, widths, strict=True)
            raise ValueError(
                f"{OP}: layers must have one width, and hook points have "
                + ", ".join(f"{width} ({point})" for point, width in pairs)
            )
        return [
            torch.cat(found[at : at + self.layers], -1) for at in range(0, len(found), self.layers)
        ]


def layer_points(model: nn.Module, hook_point: Any, target_hook_point: Any) -> LayerPoints:
    """What the arguments of `ModelSource` name.

    Raises:
        TypeError: a hook point is not a string.
        ValueError: layers are not ascending in braces, name nothing, repeat, or differ in number.
    """
    given = [hook_point] if target_hook_point is None else [hook_point, target_hook_point]
    sides: list[list[str]] = []
    places: list[Place] = []
    names: list[str | None] = []
    for argument, points in zip(ARGUMENTS, given, strict=False):
        one = isinstance(points, str) or not isinstance(points, Sequence)
        side = expand(OP, model, points) if one else list(points)
        if not side or any(side.count(point) > 1 for point in side):
            raise ValueError(f"{OP}: {argument} must name at least one layer, each once: {side}")
        places += [resolve(OP, model, point) for point in side]
        sides.append(side)
        names.append(points if one else collapse(side))
    if len(sides[-1]) != len(sides[0]):
        raise ValueError(
            f"{OP}: target_hook_point must name as many layers as hook_point, {len(sides[0])}, "
            f"got {len(sides[-1])}"
        )
    single = isinstance(hook_point, str) and not BRACES.search(hook_point)
    return LayerPoints(sides, places, names, None if single else len(sides[0]))
