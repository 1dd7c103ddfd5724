"""The recipe of the demo's runs, and the trainer of the dense comparison.

The sparse run is `gsf.train`'s own trainer with `preset(settings)`. The dense one repeats it in
plain PyTorch: the same initial weights, batches, schedules and losses, `torch.optim.Adam`.
Gemma Scope's own lr 7e-5 and threshold 0.001 take more than 400 steps to move, hence lr 1e-3 and
calibrated thresholds; the other constants are those of the preset `gemma_scope_2`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..training.calibration import Affine
from ..training.preset import Preset
from ..training.settings import Settings as Run
from ..training.sources import Stream
from .settings import Settings


def preset(settings: Settings) -> Preset:
    """The recipe, in units of x centred and scaled to unit mean squared norm."""
    s = settings
    return Preset(
        name="demo",
        lr=s.lr,
        lr_start=1 / s.lr_warmup_steps,
        lr_warmup_steps=s.lr_warmup_steps,
        lr_warmup_shape="linear",
        lr_decay_fraction=s.lr_decay_fraction,
        beta1=s.beta1,
        beta2=s.beta2,
        bandwidth=s.bandwidth,
        calibration_tokens=s.calibration_tokens,
        centred=True,
        sparsity=s.sparsity,
        sparsity_warmup_steps=math.ceil(s.steps * s.sparsity_warmup_fraction),
        frequency=s.frequency,
        frequency_scale=s.frequency_scale,
        shorten=False,
    )


def run(width: int, settings: Settings) -> Run:
    """What the sparse trainer is told."""
    return Run(
        *(width, width, settings.d_sae, settings.steps, preset(settings)),
        target_l0=settings.target_l0,
        init_l0=settings.initial_l0,
        batch_size=settings.batch,
        seed=settings.seed,
    )


def penalties(l0: Tensor, counts: Tensor, lam: float, settings: Settings) -> Tensor:
    """Pull of `l0 [n]` to the target, plus the price of latents that fire often."""
    target = settings.target_l0
    pull = lam * (2 / target) * (l0 - target).square().mean()
    rates = counts / l0.shape[0]
    return pull + settings.frequency * rates.square().sum() / settings.frequency_scale


@torch.no_grad()
def remove_parallel_gradient(W_dec: nn.Parameter) -> None:
    """Subtract from each row's gradient its component along the row (of unit norm)."""
    if W_dec.grad is not None:
        along = torch.linalg.vecdot(W_dec.grad, W_dec)
        W_dec.grad.addcmul_(W_dec, along[:, None], value=-1)


@dataclass(frozen=True)
class Step:
    """What one step reports: total loss, batch FVU and L0, seconds."""

    loss: float
    fvu: float
    l0: float
    seconds: float


class DenseTrainer:
    """Trains a module that maps `x [n, d]` to `(recon [n, d], l0 [n], counts [d_sae])`.

    Args:
        model: the module.
        W_dec: its decoder.
        stream: raw activations.
        scaled: map to the units of the recipe.
        settings: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        W_dec: nn.Parameter,
        stream: Stream,
        scaled: Affine,
        settings: Settings,
    ) -> None:
        self.model, self.W_dec, self.stream, self.scaled = model, W_dec, stream, scaled
        self.settings, self.preset, self.taken = settings, preset(settings), 0
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=settings.lr, betas=betas, fused=True
        )

    def step(self) -> Step:
        """Take one step."""
        started = time.perf_counter()
        x = self.scaled(self.stream.next(self.settings.batch)[0])
        for group in self.optimizer.param_groups:
            group["lr"] = self.preset.learning_rate(self.taken, self.settings.steps)
        recon, l0, counts = self.model(x)
        error = (recon - x).square().sum(1).mean()
        lam = self.preset.sparsity_weight(self.taken, self.settings.steps)
        loss = error + penalties(l0, counts, lam, self.settings)
        self.optimizer.zero_grad()
        loss.backward()
        remove_parallel_gradient(self.W_dec)
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        self.taken += 1
        deviation = (x - x.mean(0)).square().sum(1).mean()
        report = (loss.item(), error.item() / deviation.item(), l0.mean().item())
        return Step(*report, time.perf_counter() - started)
