"""What a model loses when it runs on reconstructions: cross-entropy, KL, FVU and L0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .capturing import Captured, Reading
from .dictionaries import maps
from .replacing import Splice
from .sites import Attached, Key, Site
from .texts import Texts

OP = "evaluate"
Ablation = Literal["zero", "mean"]
Batches = Callable[[], Iterator[Texts]]


@dataclass(frozen=True)
class ModelEvaluation:
    """What a model loses on `tokens` predictions when dictionaries are spliced into it.

    Attributes:
        keys: the dictionaries that were spliced at once.
        tokens: predictions that count: of a text token behind a text token.
        ce_clean: mean cross-entropy of the model itself, in nats.
        ce_spliced: with reconstructions in place of the activations, without error term.
        ce_ablated: with zeros in their place, or means.
        kl: mean KL(clean || spliced) of the predictions, in nats.
        kl_ablated: mean KL(clean || ablated).
        fvu: of each dictionary on the clean model's activations,
            `sum |recon - target|^2 / sum |target - mean|^2`, added up over an artefact's layers.
        l0: likewise mean active latents per token, of all layers.
    """

    keys: tuple[Key, ...]
    tokens: int
    ce_clean: float
    ce_spliced: float
    ce_ablated: float
    kl: float
    kl_ablated: float
    fvu: dict[Key, float]
    l0: dict[Key, float]

    @property
    def ce_recovered(self) -> float:
        """`(ce_ablated - ce_spliced) / (ce_ablated - ce_clean)`: 1 as the model, 0 as ablated."""
        lost = self.ce_ablated - self.ce_clean
        return (self.ce_ablated - self.ce_spliced) / lost if lost else float("nan")


class Ablate(Attached):
    """A constant in place of what dictionaries reconstruct, at the tokens of `text`."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], constants: Sequence[Tensor], text: Tensor
    ) -> None:
        super().__init__(OP, model, sites)
        self._constants, self._text = constants, text

    def write(self, index: int, layer: int, y: Tensor) -> Tensor:
        """Replace the text."""
        return torch.where(self._text[..., None], self._constants[index][layer].to(y), y)


@dataclass
class Fit:
    """Sums of one dictionary over the clean model's activations, in float64."""

    total: Any = 0.0
    squares: float = 0.0
    error: float = 0.0
    active: float = 0.0
    tokens: int = 0

    def add(self, reading: Reading, text: Tensor) -> None:
        """Take in the text of a batch."""
        module: Any = reading.module
        x, target = reading.x[text], reading.target[text].double()
        acts = module.encode(x)
        skip = (x,) if maps(module) else ()
        recon = module.decode(acts, *skip, dtype=module.b_dec.dtype)
        self.total = self.total + target.sum(0)
        self.squares += float(target.square().sum())
        self.error += float((recon.double() - target).square().sum())
        layers = acts if isinstance(acts, list) else [acts]
        self.active += sum(float(part.l0().sum()) for part in layers)
        self.tokens += len(x)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        deviation = self.squares - float(self.total.square().sum()) / self.tokens
        return self.error / deviation if deviation > 0 else float("nan")


@dataclass
class Loss:
    """Sums over the predictions under one replacement."""

    cross_entropy: float = 0.0
    divergence: float = 0.0

    def add(self, batch: Texts, clean: Tensor, logits: Tensor) -> None:
        """Take in the logits of a batch."""
        self.cross_entropy += batch.cross_entropy(logits)
        self.divergence += batch.divergence(clean, logits)


@dataclass
class Group:
    """Sites that are spliced at once, and what became of the predictions."""

    members: list[int]
    spliced: Loss = field(default_factory=Loss)
    ablated: Loss = field(default_factory=Loss)


def measure(
    model: nn.Module, sites: Sequence[Site], together: bool, batches: Batches, ablation: Ablation
) -> list[ModelEvaluation]:
    """One result per site, or one of all together."""
    every = range(len(sites))
    groups = [Group(list(every))] if together else [Group([i]) for i in every]
    constants = [torch.zeros(len(site.layers), 1, device="cpu") for site in sites]
    if ablation == "mean":
        constants = _means(model, sites, batches)
    fits, clean_sum, tokens = [Fit() for _ in sites], 0.0, 0
    for batch in batches():
        with Captured(model, sites) as captured:
            clean = batch.logits(OP, model)
        for fit, reading in zip(fits, captured, strict=True):
            fit.add(reading, batch.text)
        del captured
        clean_sum += batch.cross_entropy(clean)
        tokens += int(batch.counted.sum())
        for group in groups:
            chosen = [sites[i] for i in group.members]
            with Splice(model, chosen, None, batch.text, "none"):
                group.spliced.add(batch, clean, batch.logits(OP, model))
            with Ablate(model, chosen, [constants[i] for i in group.members], batch.text):
                group.ablated.add(batch, clean, batch.logits(OP, model))
    return [
        ModelEvaluation(
            keys=tuple(sites[i].key for i in group.members),
            tokens=tokens,
            ce_clean=clean_sum / tokens,
            ce_spliced=group.spliced.cross_entropy / tokens,
            ce_ablated=group.ablated.cross_entropy / tokens,
            kl=group.spliced.divergence / tokens,
            kl_ablated=group.ablated.divergence / tokens,
            fvu={sites[i].key: fits[i].fvu for i in group.members},
            l0={sites[i].key: fits[i].active / fits[i].tokens for i in group.members},
        )
        for group in groups
    ]


def _means(model: nn.Module, sites: Sequence[Site], batches: Batches) -> list[Tensor]:
    """`[layers, d_out]` of each site: the mean of what it reconstructs over the text."""
    totals: list[Any] = [0.0] * len(sites)
    tokens = 0
    for batch in batches():
        with Captured(model, sites) as captured:
            batch.logits(OP, model)
        for i, reading in enumerate(captured):
            totals[i] = totals[i] + reading.target[batch.text].double().sum(0)
        tokens += int(batch.text.sum())
    return [
        (total / tokens).reshape(len(site.layers), -1)
        for total, site in zip(totals, sites, strict=True)
    ]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """All of them in evaluation mode, each submodule as it was afterwards."""
    modes = {m: m.training for module in modules for m in module.modules()}
    for m in modes:
        m.training = False
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
