"""The loss of a step, as terms of `SAE.loss` or `MultiLayer.loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def evaluate(
    settings: Settings,
    module: Any,
    x: Tensor,
    target: Tensor | None,
    found: Sequence[LossTerm],
    active: list[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`module.loss`, which tells `active` what `sae_loss` says."""
    from . import blocked, layered  # they import sympy: not with this package

    run = blocked.sae_loss if settings.layers is None else layered.layered_loss
    return run(module, x, target, found, active=active)  # type: ignore[no-any-return]
