"""What the blocks of one loss evaluation share: inputs, sums of gradients, sums of terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..modules import Activation, JumpReLU
from .losses import Term, TokenStatistics

DATA = ("x", "target")
"""The tensors with one row per token; the others are weights."""


@dataclass(frozen=True)
class Inputs:
    """One evaluation: detached tensors, what needs a gradient, and the dtype of every sum.

    Attributes:
        tensors: x `[n, d_in]`, target `[n, d_out]`, W_enc, b_enc, W_dec, b_dec and, where the
            module has them, threshold and W_skip.
        activation: that of the module.
        needs: names of the tensors whose gradient is wanted.
        acc: float32, or float64 where x or a weight is.
    """

    tensors: dict[str, Tensor]
    activation: Activation
    needs: frozenset[str]
    acc: torch.dtype
    _wide: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.tensors["x"].shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.tensors["W_enc"].shape[1]

    @property
    def bandwidth(self) -> float:
        """Width of the straight-through window; 0 when no threshold needs a gradient."""
        if isinstance(self.activation, JumpReLU) and "threshold" in self.needs:
            return self.activation.bandwidth
        return 0.0

    def needs_any(self, *names: str) -> bool:
        """Whether one of these gradients is wanted."""
        return not self.needs.isdisjoint(names)

    def op(self, name: str) -> Any:
        """The op of the table that serves these dtypes."""
        return ops.overload(name, torch.empty(0, dtype=self.acc))

    def wide(self, name: str) -> Tensor:
        """A weight in `acc`: itself, or one copy per evaluation of a 16-bit weight.

        A NaN threshold invalidates its latent: there b_enc is NaN and the threshold infinite.
        """
        if name not in self._wide:
            wide = self.tensors[name].to(self.acc)
            if name in ("b_enc", "threshold") and "threshold" in self.tensors:
                invalid = self.tensors["threshold"].isnan()
                wide = wide.masked_fill(invalid, torch.nan if name == "b_enc" else torch.inf)
            self._wide[name] = wide
        return self._wide[name]


class Gradients:
    """Sums of gradients over blocks: one buffer per wanted tensor, in the tensor's strides.

    Attributes:
        kept: where the only block leaves its entries and the gradients of its reconstruction and
            gates, for a fused optimizer to finish; None where the gradients are computed here.
    """

    kept: dict[str, Any] | None = None

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._sums: dict[str, Tensor] = {}

    def buffer(self, name: str) -> Tensor:
        """The sum so far in the accumulation dtype, to be added to in place."""
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(self._inputs.tensors[name], dtype=self._inputs.acc)
        self._sums[name] = self._sums[name].to(self._inputs.acc)
        return self._sums[name]

    def add(self, name: str, part: Tensor) -> None:
        """Add a block's gradient of a weight; the first is kept as it is, without a copy."""
        if name not in self._inputs.needs:
            return
        if name in self._sums:
            self.buffer(name).add_(part)
        else:
            self._sums[name] = part

    def write(self, name: str, rows: slice, part: Tensor) -> None:
        """Store a block's gradient of x or of the target: the rows that the block owns."""
        if name not in self._inputs.needs:
            return
        if name not in self._sums:
            self._sums[name] = torch.empty_like(self._inputs.tensors[name])
        self._sums[name][rows] = part

    def pop(self, name: str) -> Tensor | None:
        """The finished gradient in the dtype of its tensor; None when it was not wanted."""
        if name not in self._inputs.needs:
            return None
        total = self._sums.pop(name) if name in self._sums else self.buffer(name)
        return total.to(self._inputs.tensors[name].dtype)


class Objective:
    """The terms: their sums over the blocks, and their gradients in recon and l0.

    Attributes:
        sums: `[len(terms) + 3]` float64 sums over the tokens: one per term, then squared error,
            squared deviation of the target from its mean, and l0.
    """

    def __init__(self, inputs: Inputs, terms: Sequence[Term]) -> None:
        self._inputs, self._terms = inputs, terms
        target = inputs.tensors["target"]
        self._mean = target.mean(0, dtype=inputs.acc)
        self.sums = torch.zeros(len(terms) + 3, dtype=torch.float64, device=target.device)

    def __call__(
        self, recon: Tensor, l0: Tensor, rows: slice, gradients: Gradients
    ) -> tuple[Tensor, Tensor | None]:
        """Count the block of tokens `rows`, and differentiate the loss for it.

        Args:
            recon: `[r, d_out]` in the accumulation dtype.
            l0: `[r]`, likewise.
            rows: position of the block in the batch.
            gradients: receives the gradient of the target.

        Returns:
            d_recon `[r, d_out]`, and d_l0 `[r]` or None where no term depends on l0.
        """
        target = self._inputs.tensors["target"][rows].to(self._inputs.acc)
        values, (d_recon, d_target, d_l0) = self._differentiate(recon, target, l0)
        error = F.mse_loss(recon, target, reduction="sum")
        deviation = F.mse_loss(target, self._mean.expand_as(target), reduction="sum")
        self.sums += torch.stack([t.double() for t in (*values, error, deviation, l0.sum())])
        gradients.write("target", rows, torch.zeros_like(target) if d_target is None else d_target)
        return torch.zeros_like(recon) if d_recon is None else d_recon, d_l0

    def _differentiate(
        self, recon: Tensor, target: Tensor, l0: Tensor
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """Sums of the terms over the block, and their gradients in recon, target and l0."""
        needs = self._inputs.needs
        wanted = (bool(needs), "target" in needs, "threshold" in needs)
        leaves = [
            t.detach().requires_grad_(want)
            for t, want in zip((recon, target, l0), wanted, strict=True)
        ]
        found: list[Tensor | None] = [None] * 3
        with torch.set_grad_enabled(bool(needs)):
            statistics = TokenStatistics(*leaves)
            sums = [_per_token(term, statistics).sum() for term in self._terms]
            total = torch.stack(sums).sum() / self._inputs.n
        if total.requires_grad:
            sources = [t for t in leaves if t.requires_grad]
            grads = iter(torch.autograd.grad(total, sources, allow_unused=True))
            found = [next(grads) if want else None for want in wanted]
        return [value.detach() for value in sums], found


def _per_token(term: Term, statistics: TokenStatistics) -> Tensor:
    value = term.per_token(statistics)
    if value.shape != statistics.l0.shape:
        raise ValueError(
            f"loss: per_token of the term {term.name!r} must return one value per token, shape "
            f"{tuple(statistics.l0.shape)}, got {tuple(value.shape)}"
        )
    return value
