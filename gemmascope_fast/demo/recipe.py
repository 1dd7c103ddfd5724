"""The training recipe, the same code for both runs.

    loss = mean_i |x_i - recon_i|^2
         + lam * (2 / L0*) * mean_i (l0_i - L0*)^2              pull to a target L0, per token
         + lam_f * sum_j p_j^2 / w0                             p_j = counts_j / n, firing rates

Adam with betas (0, 0.999) as in Gemma Scope; decoder rows have unit norm: their gradient's parallel
part is removed before the update, and they are renormalised after it. Gemma Scope's own lr 7e-5
and threshold 0.001 take more than 400 steps to move, hence lr 1e-3 and calibrated thresholds.
Sources: arXiv 2408.05147; arXiv 2407.14435; the penalties from Gemma Scope 2's technical paper.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .settings import Settings


def calibrated_thresholds(x: Tensor, W_enc: Tensor, b_enc: Tensor, l0: float) -> Tensor:
    """`[d_sae]` thresholds with which every latent fires on the share `l0 / d_sae` of `x [n, d]`.

    Latents are taken in slices, so that `[n, d_sae]` is never held.
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    fires = min(max(round(n * l0 / d_sae), 1), n - 1)
    slices = []
    for start in range(0, d_sae, 512):
        pre = x @ W_enc[:, start : start + 512] + b_enc[start : start + 512]
        largest = pre.topk(fires + 1, dim=0).values
        # Midway, not on a token's own value: there the gate would hang on the last bit.
        slices.append((largest[-2] + largest[-1]) / 2)
    return torch.cat(slices)


def initial_parameters(x: Tensor, settings: Settings) -> dict[str, Tensor]:
    """W_dec He-uniform with unit rows, W_enc its transpose, b_dec the mean of `x [n, d]`."""
    generator = torch.Generator().manual_seed(settings.seed)
    d_in = x.shape[1]
    W_dec = torch.rand(settings.d_sae, d_in, generator=generator) * 2 - 1
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    b_dec = x.mean(0)
    b_enc = -(W_dec @ b_dec)
    sample = torch.randperm(x.shape[0], generator=generator)[: settings.calibration_tokens]
    threshold = calibrated_thresholds(x[sample], W_dec.t(), b_enc, settings.initial_l0)
    W_enc = W_dec.clone().t()
    return {"W_enc": W_enc, "b_enc": b_enc, "threshold": threshold, "W_dec": W_dec, "b_dec": b_dec}


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last `lr_decay_fraction`."""
    warm = min((step + 1) / settings.lr_warmup_steps, 1.0)
    left = (settings.steps - step) / (settings.steps * settings.lr_decay_fraction)
    return settings.lr * warm * min(left, 1.0)


def sparsity_weight(step: int, settings: Settings) -> float:
    """`lam`, warmed up linearly over the first `sparsity_warmup_fraction` of the steps."""
    return settings.sparsity * min(step / (settings.steps * settings.sparsity_warmup_fraction), 1.0)


def penalties(l0: Tensor, counts: Tensor, lam: float, settings: Settings) -> Tensor:
    """Pull of `l0 [n]` to the target, plus the price of latents that fire often."""
    target = settings.target_l0
    pull = lam * (2 / target) * (l0 - target).square().mean()
    rates = counts / l0.shape[0]
    return pull + settings.frequency * rates.square().sum() / settings.frequency_scale


def batches(n: int, settings: Settings) -> list[Tensor]:
    """Token indices of every step: shuffled epochs, one after the other."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    wanted = settings.steps * settings.batch
    epochs = [torch.randperm(n, generator=generator) for _ in range(-(-wanted // n))]
    return list(torch.cat(epochs)[:wanted].view(settings.steps, settings.batch))


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


class Trainer:
    """Trains a module that maps `x [n, d]` to `(recon [n, d], l0 [n], counts [d_sae])`."""

    def __init__(self, model: nn.Module, W_dec: nn.Parameter, x: Tensor, settings: Settings):
        self.model, self.W_dec, self.x, self.settings = model, W_dec, x, settings
        self.order = batches(x.shape[0], settings)
        self.step = 0
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=settings.lr, betas=(0.0, settings.beta2), fused=True
        )

    def train(self, steps: int) -> list[Step]:
        """Take the next `steps` steps, or those that are left."""
        return [self._one() for _ in range(min(steps, self.settings.steps - self.step))]

    def _one(self) -> Step:
        started = time.perf_counter()
        x = self.x[self.order[self.step]]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        recon, l0, counts = self.model(x)
        error = (recon - x).square().sum(1).mean()
        lam = sparsity_weight(self.step, self.settings)
        loss = error + penalties(l0, counts, lam, self.settings)
        self.optimizer.zero_grad()
        loss.backward()
        remove_parallel_gradient(self.W_dec)
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        self.step += 1
        report = (loss.item(), error.item() / x.square().sum(1).mean().item(), l0.mean().item())
        return Step(*report, time.perf_counter() - started)
