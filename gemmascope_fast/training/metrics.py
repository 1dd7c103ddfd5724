"""`gsf.evaluate`: how well a dictionary reconstructs, and how its latents fire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_count
from ..checks import check_device, check_float
from ..modules import SAE, Transcoder

OP = "evaluate"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PER_DECADE = 4
LOWEST_DECADE = -8


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found on `tokens` tokens.

    Attributes:
        tokens: how many.
        fvu: fraction of variance unexplained, `sum |recon - target|^2 / sum |target - mean|^2`,
            the mean being that of these tokens.
        cosine: mean over the tokens of the cosine between recon and target.
        l0: mean active latents per token.
        l0_std: its standard deviation over the tokens.
        l0_quantiles: of the active latents per token, by share: 0 (least) to 1 (most).
        counts: `[d_sae]` int64, tokens on which each latent is active.
    """

    tokens: int
    fvu: float
    cosine: float
    l0: float
    l0_std: float
    l0_quantiles: dict[float, float]
    counts: Tensor

    @property
    def dead(self) -> int:
        """Latents that were active on no token."""
        return int((self.counts == 0).sum())

    def histogram(self) -> list[tuple[float, float, int]]:
        """Latents by firing rate: `(low, high, latents)` with `low < rate <= high`.

        The first entry, (0, 0, ...), counts those that never fired; the others are quarters of
        decades up to 1, from the first that is not empty.
        """
        rates = self.counts[self.counts > 0].double() / max(self.tokens, 1)
        slots = torch.ceil(rates.log10() * PER_DECADE - 1e-9).long().clamp_(max=0)
        slots = slots.clamp_(min=LOWEST_DECADE * PER_DECADE)
        found = [(0.0, 0.0, self.dead)]
        if len(slots):
            for slot in range(int(slots.min()), 1):
                low, high = (10.0 ** (at / PER_DECADE) for at in (slot - 1, slot))
                found.append((low, high, int((slots == slot).sum())))
        return found

    def summary(self) -> dict[str, Any]:
        """Everything but the counts, as JSON."""
        numbers = {name: getattr(self, name) for name in ("tokens", "fvu", "cosine", "l0")}
        quantiles = {f"{share:g}": value for share, value in self.l0_quantiles.items()}
        return {
            **numbers,
            "l0_std": self.l0_std,
            "l0_quantiles": quantiles,
            "dead": self.dead,
            "histogram": self.histogram(),
        }


@torch.no_grad()
def evaluate(
    module: SAE, activations: Tensor, target: Tensor | None = None, *, batch_size: int = 4096
) -> Evaluation:
    """Measure `module` on activations, a batch at a time.

    Args:
        module: reads raw activations, as `train` and `load` return it; evaluated in evaluation
            mode. A BatchTopK without a running threshold selects over each batch.
        activations: `[*batch, d_in]` floating point, on the module's device or another.
        target: `[*batch, d_out]`; default the activations, needed by a `Transcoder`.
        batch_size: tokens at a time, >= 1.

    Returns:
        FVU, cosine, L0 and its spread, firing counts with dead latents and histogram.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes disagree, there is no token, or the target is missing.
    """
    x, wanted = _check(module, activations, target, batch_size)
    training = module.training
    module.eval()
    try:
        return _measure(module, x, wanted, batch_size)
    finally:
        module.train(training)


def _measure(module: SAE, x: Tensor, wanted: Tensor, batch_size: int) -> Evaluation:
    device = module.W_enc.device
    mean = torch.zeros(module.d_out, dtype=torch.float64, device=device)
    for goal in torch.split(wanted, batch_size):
        mean += goal.to(device).sum(0, dtype=torch.float64) / len(x)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    counts = torch.zeros(module.d_sae, dtype=torch.int64, device=device)
    l0 = []
    for part, goal in zip(torch.split(x, batch_size), torch.split(wanted, batch_size), strict=True):
        part, goal = part.to(device), goal.to(device)
        acts = module.encode(part)
        recon = _decode(module, acts, part).double()
        goal = goal.double()
        sums[0] += (recon - goal).square().sum()
        sums[1] += (goal - mean).square().sum()
        sums[2] += F.cosine_similarity(recon, goal, dim=1).sum()
        l0.append(acts.l0())
        counts += acts.counts().long()
    error, deviation, cosine = sums.tolist()
    per_token = torch.cat(l0).double().cpu().sort().values
    places = [round(share * (len(x) - 1)) for share in QUANTILES]
    return Evaluation(
        tokens=len(x),
        fvu=error / deviation if deviation else float("nan"),
        cosine=cosine / len(x),
        l0=float(per_token.mean()),
        l0_std=float(per_token.std(correction=0)),
        l0_quantiles={
            share: float(per_token[at]) for share, at in zip(QUANTILES, places, strict=True)
        },
        counts=counts.cpu(),
    )


def _decode(module: SAE, acts: Any, x: Tensor) -> Tensor:
    if isinstance(module, Transcoder):
        return module.decode(acts, x, dtype=module.b_dec.dtype)
    return module.decode(acts, dtype=module.b_dec.dtype)


def _check(
    module: SAE, activations: Tensor, target: Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    """`(x, target)` as matrices."""
    if not isinstance(module, SAE):
        raise TypeError(f"{OP}: module must be an SAE or a Transcoder, got {type(module).__name__}")
    if check_count(OP, "batch_size", batch_size) < 1:
        raise ValueError(f"{OP}: batch_size must be >= 1, got {batch_size}")
    check_float(OP, "activations", activations)
    if target is None:
        if isinstance(module, Transcoder) or module.d_in != module.d_out:
            raise ValueError(f"{OP}: target is needed by a {type(module).__name__}")
        target = activations
    check_float(OP, "target", target)
    check_device(OP, "target", target, activations)
    for name, t, width in (
        ("activations", activations, module.d_in),
        ("target", target, module.d_out),
    ):
        if t.dim() < 1 or t.shape[-1] != width:
            raise ValueError(f"{OP}: {name} must have width {width}, got shape {tuple(t.shape)}")
    if target.shape[:-1] != activations.shape[:-1] or activations.numel() == 0:
        raise ValueError(
            f"{OP}: activations and target must have the same tokens, at least one, got shapes "
            f"{tuple(activations.shape)} and {tuple(target.shape)}"
        )
    return activations.reshape(-1, module.d_in), target.reshape(-1, module.d_out)
