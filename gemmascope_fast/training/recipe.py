"""The loss of a step, by either of two paths.

*Blocks*: `SAE.loss` with terms; bounded memory at any density, gradients in buffers.
*Fused*: encode, decode and the named losses under autograd, whose backward leaves the matrices'
gradients to the optimizer's step, row by row; for batches whose entries fit one block. A nested
(Matryoshka) loss and the dead latents' loss take the first path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..modules import SAE, JumpReLU, Transcoder
from .losses import LossTerm, Matryoshka, QuadraticL0, Reconstruction
from .losses_batch import Frequency, QuadraticMeanL0
from .losses_weights import AuxK
from .settings import Settings

SURPLUS = 2.0
"""Entries of a batch over those of the one before that the fused path is prepared for."""


@dataclass(frozen=True)
class Found:
    """Loss of a step.

    Attributes:
        loss: scalar that `backward` is called on.
        metrics: its terms, fvu, l0, density.
        fired: `[d_sae]` bool, latents that were active, where the path tells; else None.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    fired: Tensor | None


class Recipe:
    """Losses of a run.

    Args:
        settings: of the run.
        device: where it trains.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings, self._device = settings, device

    def __call__(
        self, module: SAE, x: Tensor, target: Tensor | None, step: int, density: float, dead: Tensor
    ) -> Found:
        """Evaluate step `step`.

        Args:
            module: the weights.
            x: `[n, d_in]` scaled.
            target: `[n, d_out]`, None where it is x.
            step: steps taken.
            density: share of active latents in the batch before.
            dead: `[d_sae]` bool.
        """
        if self.fusable(density) and not self._revives(dead):
            return self._fused(module, x, x if target is None else target, step)
        loss, metrics = module.loss(x, target, self.terms(step, dead))
        return Found(loss, metrics, None)

    def fusable(self, density: float) -> bool:
        """Whether a batch of about this density goes the fused way."""
        from .blocked import CROSSOVER, DEFAULT_LIMITS, ENTRY_BYTES  # it imports sympy

        s = self._settings
        if not s.fused or s.matryoshka is not None:
            return False
        expected = SURPLUS * density * s.batch_size * s.d_sae * ENTRY_BYTES
        sparse = density <= CROSSOVER.get(self._device.type, 0.0) or s.activation != "jumprelu"
        return sparse and expected <= DEFAULT_LIMITS.entry_bytes

    def terms(self, step: int, dead: Tensor) -> list[LossTerm]:
        """Terms of `SAE.loss` for step `step`."""
        s, preset = self._settings, self._settings.preset
        terms: list[LossTerm] = [Reconstruction()]
        if s.matryoshka is not None:
            terms = [Matryoshka(s.matryoshka)]
        if s.target_l0 is not None:
            target, lam = self._pull(step)
            pull = QuadraticL0(target, lam)
            terms.append(pull if preset.per_token else QuadraticMeanL0(lam, target=target))
            if preset.frequency:
                terms.append(Frequency(preset.frequency, w0=preset.frequency_scale))
        elif self._revives(dead):
            terms.append(AuxK(dead, max(s.d_in // 2, 1), preset.auxk))
        return terms

    def _revives(self, dead: Tensor) -> bool:
        """Whether the dead latents have a loss of their own."""
        s = self._settings
        return s.target_l0 is None and s.preset.auxk > 0 and bool(dead.any())

    def _pull(self, step: int) -> tuple[float, float]:
        """Target L0 and its weight."""
        s = self._settings
        assert s.target_l0 is not None
        target = s.preset.target_l0(step, s.steps, s.target_l0)
        return target, s.preset.sparsity_weight(step, s.steps)

    def _fused(self, module: SAE, x: Tensor, target: Tensor, step: int) -> Found:
        preset = self._settings.preset
        acts = module.encode(x)
        if isinstance(module, Transcoder):
            recon = module.decode(acts, x, dtype=target.dtype)
        else:
            recon = module.decode(acts, dtype=target.dtype)
        values = {"reconstruction": losses.squared_error(recon, target)}
        if isinstance(module.activation, JumpReLU):
            goal, lam = self._pull(step)
            if preset.per_token:
                values["quadratic_l0"] = lam * losses.quadratic_l0(acts, goal)
            else:
                values["quadratic_mean_l0"] = lam * losses.quadratic_mean_l0(acts, goal)
            if preset.frequency:
                rate = losses.frequency(acts, preset.frequency_scale)
                values["frequency"] = preset.frequency * rate
        loss = torch.stack(list(values.values())).sum()
        with torch.no_grad():
            metrics = {name: value.detach() for name, value in values.items()}
            deviation = (target - target.mean(0)).square_().sum() / len(target)
            counts = acts.counts()
            l0 = counts.sum() / len(target)
            metrics |= {"fvu": values["reconstruction"] / deviation, "l0": l0}
            metrics["density"] = l0 / module.d_sae
        return Found(loss, metrics, counts > 0)
