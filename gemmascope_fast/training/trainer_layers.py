"""`Trainer` of a crosscoder or CLT: every layer has a scale, a mean and thresholds of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calibration_layers import LayersAffine, fold_layers_, measure_layers, start_layers
from .settings import Settings
from .trainer import Trainer


class LayersTrainer(Trainer):
    """One run over several layers; the source's rows are `[L * d]`, the module's x `[L, d]`."""

    @property
    def _layers(self) -> int:
        assert self.settings.layers is not None
        return self.settings.layers

    def _map(self, width: int, scale: Any) -> LayersAffine:
        mean = torch.zeros(self._layers, width, device=self.device)
        return LayersAffine(mean, tuple(scale))

    def _measure(self, name: str, side: int) -> LayersAffine:
        centred = self.settings.preset.centred
        return measure_layers(name, self._parts(side), centred, self.device, self._layers)

    def _start(self, x: Tensor, target: Tensor) -> None:
        preset = self.settings.preset
        start_layers(self.module, x, target, self.settings.start_l0, preset.init_threshold)

    def _fold(self, module: Any, maps: Sequence[Any]) -> None:
        fold_layers_(module, *maps)


def trainer_of(settings: Settings) -> type[Trainer]:
    """The class that trains the kind of `settings`."""
    return Trainer if settings.layers is None else LayersTrainer
