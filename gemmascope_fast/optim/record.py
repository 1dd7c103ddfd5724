"""One forward pass under a fused optimizer: what its step will need, as it arrives."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..activations import JumpReLU
from ..operands import widen
from ..sparse import SparseActs
from .layers import Part

if TYPE_CHECKING:
    from .deferred import Deferred

OP = "Adam(fused=True)"


class Record:
    """One forward pass: its input, its entries, and the gradients that have arrived."""

    def __init__(self, owner: Deferred, module: Part, x: Tensor, acts: SparseActs) -> None:
        self._owner = weakref.ref(owner)
        self.x = x.detach().reshape(-1, module.d_in)
        self.acts = acts.detach()
        self.versions = tuple(p._version for p in (module.W_enc, module.W_dec))
        self.ends = [module.d_sae]
        self.found: dict[str, Tensor] = {}
        self.scale: Tensor | None = None  # of what is found; None: 1

    def receive(self, name: str, gradient: Tensor) -> None:
        """Keep a gradient; the first one makes this record the pending one."""
        owner = self._owner()
        other = owner is not None and owner.pending not in (None, self)
        if owner is None or other or name in self.found:
            raise RuntimeError(
                f"{OP}: a second backward() before step(): the first one's gradients would be "
                "lost; call step() or zero_grad() in between, or use fused=False to accumulate"
            )
        owner.pending = self
        self.found[name] = gradient

    def run(
        self,
        module: Part,
        states: list[list[Tensor]],
        rates: list[list[float]],
        rules: list[list[int]],
    ) -> tuple[Tensor, Tensor]:
        """Backward and update of both matrices; returns d_b_enc and d_threshold."""
        acts, n = self.acts, self.x.shape[0]
        d_recon = self._scaled("d_recon")
        if d_recon is None:
            d_recon = acts.values.new_zeros(()).expand(1, n, module.d_out)
        threshold, bandwidth = None, 0.0
        if isinstance(module.activation, JumpReLU) and module.threshold is not None:
            if module.threshold.requires_grad:
                threshold, bandwidth = module.threshold.detach(), module.activation.bandwidth
        operands = (self.x, module.W_enc, module.W_dec, acts.values, d_recon)
        d_b_enc, d_threshold, _ = ops.overload("fused_sparse_step", *operands)(
            *(self.x, module.W_enc.detach(), None if threshold is None else widen(threshold)),
            *(bandwidth, module.W_dec.detach(), d_recon, self.ends, acts.offsets),
            *(acts.indices, widen(acts.values), widen(acts.gate)),
            *(self._scaled("d_values"), self._scaled("d_gate"), *acts.by_feature()),
            *(*states, *rates, *rules),
        )
        return d_b_enc, d_threshold

    def _scaled(self, name: str) -> Tensor | None:
        """What was found, a copy where it is scaled: one layer's at a time."""
        gradient = self.found.get(name)
        if gradient is None or self.scale is None:
            return gradient
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (gradient.to(wide) * self.scale.to(wide)).to(gradient.dtype)
