"""What the blocks of one loss evaluation share: inputs and sums of gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..modules import Activation, JumpReLU
from ..screening import Screen
from ..semantics import Semantics
from .whole import WHOLE, Whole


@dataclass(frozen=True)
class Inputs:
    """One evaluation: detached tensors, what needs a gradient, and the dtype of every sum.

    Attributes:
        tensors: x `[n, d_in]`, target `[n, d_out]`, W_enc, b_enc, W_dec, b_dec and, where the
            module has them, threshold and W_skip.
        activation: that of the module.
        needs: names of the tensors whose gradient is wanted.
        acc: float32, or float64 where x or a weight is.
        semantics: those of the module, as far as they are not applied to the tensors already.
        whole: answers for the processes that share tokens or latents.
        tokens: number of tokens of all of them.
        codes: those of W_enc, of a module that keeps some.
        screen: what keeps them.
        smallest: the smallest active value of each block of a BatchTopK (`smallest_active`).
    """

    tensors: dict[str, Tensor]
    activation: Activation
    needs: frozenset[str]
    acc: torch.dtype
    semantics: Semantics = Semantics()
    whole: Whole = WHOLE
    tokens: int = 0
    codes: Tensor | None = None
    screen: Screen | None = None
    smallest: list[Tensor | None] = field(default_factory=list)
    _wide: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def n(self) -> int:
        """Number of tokens here."""
        return self.tensors["x"].shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents here."""
        return self.tensors["W_enc"].shape[1]

    @property
    def bandwidth(self) -> float:
        """Width of the straight-through kernel; 0 when nothing behind it needs a gradient."""
        behind = ["threshold"]
        if self.semantics.gradient_to_x:
            behind += ["x", "W_enc", "b_enc"]
        if isinstance(self.activation, JumpReLU) and self.needs_any(*behind):
            return self.activation.bandwidth
        return 0.0

    @property
    def emission(self) -> float:
        """Width of the window of entries to store."""
        return self.semantics.emission(self.bandwidth)

    def needs_any(self, *names: str) -> bool:
        """Whether one of these gradients is wanted."""
        return not self.needs.isdisjoint(names)

    def op(self, name: str) -> Any:
        """The op of the table that serves these dtypes."""
        serve = ops.overload(name, torch.empty(0, dtype=self.acc, device="cpu"))
        return functools.partial(ops.call, serve)

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

    def decoder_norms(self) -> Tensor:
        """`[d_sae]` norms of the decoder's rows in `acc`, computed once per evaluation."""
        if "norms" not in self._wide:
            self._wide["norms"] = torch.linalg.vector_norm(self.wide("W_dec"), dim=1)
        return self._wide["norms"]


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

    def started(self, *names: str) -> bool:
        """Whether one of these sums has a summand."""
        return not self._sums.keys().isdisjoint(names)

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

    def add_rows(self, name: str, rows: slice, part: Tensor) -> None:
        """Add to the gradient of x or of the target, which is there already."""
        if name in self._inputs.needs:
            self._sums[name][rows] += part.to(self._sums[name].dtype)

    def pop(self, name: str) -> Tensor | None:
        """The finished gradient in the dtype of its tensor; None when it was not wanted."""
        if name not in self._inputs.needs:
            return None
        total = self._sums.pop(name) if name in self._sums else self.buffer(name)
        return total.to(self._inputs.tensors[name].dtype)
