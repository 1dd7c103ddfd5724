"""Training recipes: every constant of a run that is not a size.

    loss = mean_i |recon_i - x_i|^2
         + lam * (2 / L0*) * (l0 - L0*)^2            squared per token, or on the batch mean
         + lam_f * sum_j p_j^2 / w0                  p_j: share of the batch on which latent j fires

in units where x has unit mean squared norm. Adam, in both presets with betas (0, beta2); decoder
rows have unit norm: the parallel part of their gradient is removed before the update, their norm
restored after.
Sources: Gemma Scope 2's technical paper; what it leaves open is from arXiv 2408.05147 (Gemma Scope
1) and arXiv 2407.14435 (JumpReLU). Nothing published gives lam, lam_f and w0: these are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..arguments import check_count, check_number, plain_fields
from .schedules import decay, glide, warmup

SHAPES = ("cosine", "linear")
POSITIVE = ("lr", "bandwidth", "eps", "frequency_scale")


@dataclass(frozen=True)
class Preset:
    """Constants of a recipe.

    Args:
        name: of the recipe.
        lr: learning rate after its warm-up.
        lr_start: share of `lr` at step 0, in [0, 1].
        lr_warmup_steps: length of the warm-up.
        lr_warmup_shape: "cosine" or "linear".
        lr_decay_fraction: share of the run, at its end, in which lr falls linearly to 0.
        beta1: of Adam's first moment, in [0, 1); 0 has none. Above 0 it takes a float32 matrix
            beside each matrix, and `rows` of `train` matters.
        beta2: of its second moment, in [0, 1).
        eps: of Adam.
        bandwidth: width of the straight-through window, in units of scaled pre-activations.
        init_threshold: of every latent, where thresholds are not calibrated.
        calibrated: whether thresholds start at quantiles of a sample and b_dec at its mean.
        calibration_tokens: tokens of that sample, >= 2.
        statistics_tokens: tokens from which scale and mean are estimated, >= 1.
        centred: whether x is also centred before training (folded away at the end, as the scale).
        sparsity: lam.
        sparsity_warmup_steps: steps in which lam rises linearly from 0.
        per_token: whether the quadratic pull is squared per token (else on the batch mean).
        target_l0_start: where the target begins, gliding to the wanted one; None keeps it constant.
        target_l0_steps: length of that glide.
        frequency: lam_f.
        frequency_scale: w0.
        auxk: coefficient of the dead latents' reconstruction of the residual; topk and batchtopk.
        threshold_decay: of BatchTopK's running threshold, which the result encodes with, in [0, 1).
        shorten: whether warm-ups and the glide take at most a tenth (lr) and a fifth (the others)
            of the run.

    Raises:
        TypeError: a number is none.
        ValueError: a number is out of its range.
    """

    name: str = "gemma_scope_2"
    lr: float = 7e-5
    lr_start: float = 0.1
    lr_warmup_steps: int = 1000
    lr_warmup_shape: str = "cosine"
    lr_decay_fraction: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    bandwidth: float = 0.001
    init_threshold: float = 0.001
    calibrated: bool = True
    calibration_tokens: int = 4096
    statistics_tokens: int = 1 << 18
    centred: bool = False
    sparsity: float = 3e-3
    sparsity_warmup_steps: int = 50_000
    per_token: bool = True
    target_l0_start: float | None = None
    target_l0_steps: int = 50_000
    frequency: float = 1e-3
    frequency_scale: float = 0.01
    auxk: float = 1 / 32
    threshold_decay: float = 0.99
    shorten: bool = True

    def __post_init__(self) -> None:
        plain_fields(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                check_count("Preset", field.name, value)
            elif field.type == "float" or (field.type == "float | None" and value is not None):
                check_number("Preset", field.name, value, positive=field.name in POSITIVE)
        for name in ("lr_start", "lr_decay_fraction"):
            if getattr(self, name) > 1:
                raise ValueError(f"Preset: {name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2", "threshold_decay"):
            if getattr(self, name) >= 1:
                raise ValueError(f"Preset: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.lr_warmup_shape not in SHAPES:
            raise ValueError(
                f"Preset: lr_warmup_shape must be cosine or linear, got {self.lr_warmup_shape!r}"
            )
        if self.calibration_tokens < 2 or self.statistics_tokens < 1:
            raise ValueError("Preset: calibration_tokens must be >= 2, statistics_tokens >= 1")

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` of `steps`."""
        length = self._length(self.lr_warmup_steps, steps, 10)
        warm = warmup(step, length, self.lr_start, self.lr_warmup_shape)
        return self.lr * warm * decay(step, steps, self.lr_decay_fraction)

    def sparsity_weight(self, step: int, steps: int) -> float:
        """`lam` of step `step` of `steps`."""
        length = self._length(self.sparsity_warmup_steps, steps, 5)
        return self.sparsity * warmup(step, length, 0.0, "linear")

    def target_l0(self, step: int, steps: int, target: float) -> float:
        """`L0*` of step `step` of `steps`."""
        if self.target_l0_start is None:
            return target
        return glide(
            step, self._length(self.target_l0_steps, steps, 5), self.target_l0_start, target
        )

    def _length(self, wanted: int, steps: int, share: int) -> int:
        return min(wanted, math.ceil(steps / share)) if self.shorten else wanted


GEMMA_SCOPE_2 = Preset()
"""The recipe with a calibrated start: thresholds at quantiles, warm-ups fitted to the run."""

GEMMA_SCOPE_2_LITERAL = Preset(
    name="gemma_scope_2_literal", calibrated=False, shorten=False, frequency=0.0
)
"""As published: every threshold 0.001, biases 0, warm-ups of 1,000 and 50,000 steps. About half of
all latents fire for the first thousand steps."""

PRESETS = {preset.name: preset for preset in (GEMMA_SCOPE_2, GEMMA_SCOPE_2_LITERAL)}


def find_preset(preset: str | Preset, op: str = "train") -> Preset:
    """`preset` itself, or the one of that name; an argument of `op`.

    Raises:
        TypeError: it is neither.
        ValueError: there is no preset of that name.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise TypeError(f"{op}: preset must be a name or a Preset, got {type(preset).__name__}")
    if preset not in PRESETS:
        raise ValueError(f"{op}: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]
