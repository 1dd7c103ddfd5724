"""The loss of a step, as terms of `SAE.loss` or `MultiLayer.loss`."""

from __future__ import annotations

from torch import Tensor

from .losses import LossTerm, Matryoshka, QuadraticL0, Reconstruction
from .losses_batch import Frequency, QuadraticMeanL0
from .losses_weights import AuxK
from .settings import Settings


def terms(settings: Settings, step: int, dead: Tensor) -> list[LossTerm]:
    """Terms of step `step`.

    Args:
        settings: of the run.
        step: steps taken.
        dead: `[d_sae]` bool, or `[L * d_sae]`: latents that topk and batchtopk give a loss of
            their own.
    """
    s, preset = settings, settings.preset
    found: list[LossTerm] = [Reconstruction()]
    if s.matryoshka is not None:
        found = [Matryoshka(s.matryoshka)]
    if s.target_l0 is not None:
        target = preset.target_l0(step, s.steps, s.target_l0)
        lam = preset.sparsity_weight(step, s.steps)
        pull = QuadraticL0(target, lam)
        found.append(pull if preset.per_token else QuadraticMeanL0(lam, target=target))
        if preset.frequency:
            found.append(Frequency(preset.frequency, w0=preset.frequency_scale))
    elif preset.auxk > 0 and bool(dead.any()):
        found.append(AuxK(dead, s.k_aux, preset.auxk))
    return found
