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
from ..multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer
from ..multilayer.base import check_stack
from ..sparse import SparseActs

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
            the mean being that of these tokens; both sums are over all layers, hence those of the
            largest norms decide.
        cosine: mean over the tokens, and layers, of the cosine between recon and target.
        l0: mean active latents per token, of all layers.
        l0_std: its standard deviation over the tokens.
        l0_quantiles: of the active latents per token, by share: 0 (least) to 1 (most).
        counts: `[d_sae]` int64, tokens on which each latent is active; `[L * d_sae]` of a
            dictionary over L layers, layer after layer.
        fvu_by_layer: of each output layer by itself; empty for a dictionary of one layer.
        l0_by_layer: of the latents of each layer; likewise.
    """

    tokens: int
    fvu: float
    cosine: float
    l0: float
    l0_std: float
    l0_quantiles: dict[float, float]
    counts: Tensor
    fvu_by_layer: tuple[float, ...] = ()
    l0_by_layer: tuple[float, ...] = ()

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
        layers = {name: getattr(self, name) for name in ("fvu_by_layer", "l0_by_layer")}
        return {
            **numbers,
            "l0_std": self.l0_std,
            "l0_quantiles": quantiles,
            "dead": self.dead,
            "histogram": self.histogram(),
            **{name: list(values) for name, values in layers.items() if values},
        }


@torch.no_grad()
def evaluate(
    module: SAE | MultiLayer,
    activations: Tensor,
    target: Tensor | None = None,
    *,
    batch_size: int = 4096,
) -> Evaluation:
    """Measure `module` on activations, a batch at a time.

    Args:
        module: reads raw activations, as `train` and `load` return it; evaluated in evaluation
            mode. A BatchTopK without a running threshold selects over each batch.
        activations: `[*batch, d_in]` floating point, on the module's device or another;
            `[*batch, L, d_model]` for a dictionary over L layers.
        target: `[*batch, d_out]`, or `[*batch, L, d_model]`; default the activations, needed by a
            `Transcoder` or `CrossLayerTranscoder`.
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


def _measure(module: SAE | MultiLayer, x: Tensor, wanted: Tensor, batch_size: int) -> Evaluation:
    """Of x and target `[n, L, d]`; a dictionary of one layer has L = 1."""
    device, (_, layers, width) = module.b_dec.device, wanted.shape
    mean = torch.zeros(layers, width, dtype=torch.float64, device=device)
    for goal in torch.split(wanted, batch_size):
        mean += goal.to(device).sum(0, dtype=torch.float64) / len(x)
    sums = torch.zeros(3, layers, dtype=torch.float64, device=device)
    counts = torch.zeros(layers, module.d_sae, dtype=torch.int64, device=device)
    l0 = []
    for part, goal in zip(torch.split(x, batch_size), torch.split(wanted, batch_size), strict=True):
        acts, recon = _run(module, part.to(device))
        recon, goal = recon.double(), goal.to(device).double()
        sums[0] += (recon - goal).square().sum((0, 2))
        sums[1] += (goal - mean).square().sum((0, 2))
        sums[2] += F.cosine_similarity(recon, goal, dim=2).sum(0)
        l0.append(torch.stack([each.l0() for each in acts], 1))
        counts += torch.stack([each.counts().long() for each in acts])
    return _evaluation(isinstance(module, MultiLayer), sums, torch.cat(l0), counts.cpu())


def _evaluation(several: bool, sums: Tensor, l0: Tensor, counts: Tensor) -> Evaluation:
    """From sums over tokens of error, deviation and cosine `[3, L]`, l0 `[n, L]`, counts."""
    n, layers = l0.shape
    by_layer = l0.double().cpu()
    per_token = by_layer.sum(1).sort().values
    places = [round(share * (n - 1)) for share in QUANTILES]
    error, deviation, cosine = sums.sum(1).tolist()
    errors, deviations, _ = sums.tolist()
    return Evaluation(
        tokens=n,
        fvu=_ratio(error, deviation),
        cosine=cosine / (n * layers),
        l0=float(per_token.mean()),
        l0_std=float(per_token.std(correction=0)),
        l0_quantiles={
            share: float(per_token[at]) for share, at in zip(QUANTILES, places, strict=True)
        },
        counts=counts.flatten(),
        fvu_by_layer=tuple(map(_ratio, errors, deviations)) if several else (),
        l0_by_layer=tuple(by_layer.mean(0).tolist()) if several else (),
    )


def _ratio(error: float, deviation: float) -> float:
    return error / deviation if deviation else float("nan")


def _run(module: SAE | MultiLayer, x: Tensor) -> tuple[list[SparseActs], Tensor]:
    """Activations of each layer and the reconstruction `[n, L, d]`, of x `[n, L, d]`."""
    dtype = module.b_dec.dtype
    if isinstance(module, MultiLayer):
        several = module.encode(x)
        if isinstance(module, CrossLayerTranscoder):
            return several, module.decode(several, x, dtype=dtype)
        assert isinstance(module, Crosscoder)
        return several, module.decode(several, dtype=dtype)
    x = x[:, 0]
    acts = module.encode(x)
    if isinstance(module, Transcoder):
        return [acts], module.decode(acts, x, dtype=dtype)[:, None]
    return [acts], module.decode(acts, dtype=dtype)[:, None]


def _check(
    module: SAE | MultiLayer, activations: Tensor, target: Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    """`(x, target)` as `[n, L, d]`."""
    if not isinstance(module, (SAE, MultiLayer)):
        raise TypeError(
            f"{OP}: module must be an SAE, Transcoder, Crosscoder or CrossLayerTranscoder, got "
            f"{type(module).__name__}"
        )
    if check_count(OP, "batch_size", batch_size) < 1:
        raise ValueError(f"{OP}: batch_size must be >= 1, got {batch_size}")
    check_float(OP, "activations", activations)
    maps = isinstance(module, (Transcoder, CrossLayerTranscoder))
    if target is None:
        if maps or (isinstance(module, SAE) and module.d_in != module.d_out):
            raise ValueError(f"{OP}: target is needed by a {type(module).__name__}")
        target = activations
    check_float(OP, "target", target)
    check_device(OP, "target", target, activations)
    _check_width(module, "activations", activations)
    _check_width(module, "target", target)
    if target.shape[:-1] != activations.shape[:-1] or activations.numel() == 0:
        raise ValueError(
            f"{OP}: activations and target must have the same tokens, at least one, got shapes "
            f"{tuple(activations.shape)} and {tuple(target.shape)}"
        )
    layers = module.n_layers if isinstance(module, MultiLayer) else 1
    return (
        activations.reshape(-1, layers, activations.shape[-1]),
        target.reshape(-1, layers, target.shape[-1]),
    )


def _check_width(module: SAE | MultiLayer, name: str, t: Tensor) -> None:
    if isinstance(module, MultiLayer):
        check_stack(OP, name, t, module)
        return
    width = module.d_out if name == "target" else module.d_in
    if t.dim() < 1 or t.shape[-1] != width:
        raise ValueError(f"{OP}: {name} must have width {width}, got shape {tuple(t.shape)}")
