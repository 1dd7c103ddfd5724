"""The terms of one evaluation: their sums over the blocks, and their gradients where blocks meet.

A block gives its reconstructions, L0, activations and firing counts, and takes back the gradients
in each; what lies between those and the weights is the business of `block_paths.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.sparsity import rates
from .evaluation import Gradients, Inputs
from .losses import LossTerm, Term, TokenStatistics
from .losses_batch import BatchTerm
from .losses_entries import EntryTerm
from .losses_weights import WeightTerm

SLICE = 8192
"""Rows of the target that are converted at a time."""


class Objective:
    """The terms of one evaluation.

    Attributes:
        ends: numbers of leading latents whose reconstructions are wanted, ascending; the last is
            that of all.
        sums: `[len(terms) + 2]` float64 sums over the tokens here: one per term, then squared error
            and l0.
        deviation: squared deviation of all targets from their mean, a float64 sum.
        residual: `[n, d_out]` target minus reconstruction, where a term needs it.
        counts: `[d_sae]` firing counts of the whole batch, where known.
    """

    def __init__(self, inputs: Inputs, terms: Sequence[LossTerm]) -> None:
        self._inputs, self._terms = inputs, terms
        target = inputs.tensors["target"]
        self.sums = torch.zeros(len(terms) + 2, dtype=torch.float64, device=target.device)
        self.deviation = torch.zeros((), dtype=torch.float64, device=target.device)
        mean = inputs.whole.mean(target, inputs.acc)
        for part in target.split(SLICE):  # type: ignore[no-untyped-call]
            wide = part.to(inputs.acc)
            self.deviation += F.mse_loss(wide, mean.expand_as(wide), reduction="sum").double()
        self.deviation = inputs.whole.over_tokens(self.deviation)
        self._deviation = (self.deviation / max(inputs.tokens, 1)).to(inputs.acc)
        ends = {end for t in terms if isinstance(t, Term) for end in t.prefixes}
        d_sae = inputs.whole.d_sae(inputs.d_sae)
        self.ends = (*sorted(ends - {d_sae}), d_sae)
        kept = any(isinstance(t, WeightTerm) and t.needs_residual for t in terms)
        self.residual = torch.empty_like(target, dtype=inputs.acc) if kept else None
        self.counts: Tensor | None = None
        self._d_counts: Tensor | None = None

    @property
    def needs_counts(self) -> bool:
        """Whether a term needs the counts of the batch before the first gradient."""
        return any(isinstance(t, BatchTerm) and t.counts is None for t in self._terms)

    def totals(self) -> Tensor:
        """`sums` over all tokens and latents, once every block has added to them."""
        mine = [at for at, t in enumerate(self._terms) if _of_latents(t)]
        if mine:  # the other terms are of whole reconstructions and counts
            self.sums[mine] = self._inputs.whole.over_latents(self.sums[mine])
        return self._inputs.whole.over_tokens(self.sums)

    def tokens(
        self, recons: Tensor, l0: Tensor, rows: slice, gradients: Gradients
    ) -> tuple[Tensor, Tensor | None]:
        """Count the block of tokens `rows`, and differentiate the terms per token.

        Args:
            recons: `[G, r, d_out]` in the accumulation dtype, one per element of `ends`, made by
                the latents here.
            l0: `[r]`, likewise.
            rows: position of the block in the batch.
            gradients: receives the gradient of the target.

        Returns:
            d_recons `[G, r, d_out]`, and d_l0 `[r]` or None where no term depends on l0.
        """
        whole, target = self._inputs.whole, self._inputs.tensors["target"][rows]
        recons, l0 = whole.over_latents(recons), whole.over_latents(l0)
        target = target.to(self._inputs.acc)
        (d_recons, d_target, d_l0), error = self._differentiate(recons, target, l0)
        self.sums[-2].add_(error)
        self.sums[-1].add_(l0.sum())
        if self.residual is not None:
            torch.sub(target, recons[-1], out=self.residual[rows])
        if "target" in self._inputs.needs:
            d_target = torch.zeros_like(target) if d_target is None else d_target
            gradients.write("target", rows, d_target)
        return torch.zeros_like(recons) if d_recons is None else d_recons, d_l0

    def _differentiate(
        self, recons: Tensor, target: Tensor, l0: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Gradients of the terms per token in recons, target and l0, and the squared error."""
        needs = self._inputs.needs
        wanted = (bool(needs), "target" in needs, self._inputs.bandwidth > 0)
        leaves = [
            t.detach().requires_grad_(want)
            for t, want in zip((recons, target, l0), wanted, strict=True)
        ]
        with torch.set_grad_enabled(bool(needs)):
            one = len(self.ends) == 1  # as a view, whose gradient is one too
            made = (leaves[0].squeeze(0),) if one else leaves[0].unbind()
            prefixes = dict(zip(self.ends, made, strict=True))
            recon = prefixes[self.ends[-1]]
            statistics = TokenStatistics(recon, leaves[1], leaves[2], self._deviation, prefixes)
            total = recons.new_zeros(())
            for at, term in enumerate(self._terms):
                if isinstance(term, Term):
                    value = _per_token(term, statistics).sum()
                    self.sums[at].add_(value.detach())
                    total = total + value
            total = total / self._inputs.tokens
        error = statistics.squared_error.detach().sum()  # a term's own, as a rule
        if not total.requires_grad:
            return (None, None, None), error
        sources = [t for t in leaves if t.requires_grad]
        grads = iter(torch.autograd.grad(total, sources, allow_unused=True))
        return [next(grads) if want else None for want in wanted], error

    def entries(
        self, inputs: Inputs, values: Tensor, latents: Tensor | None, gradients: Gradients
    ) -> Tensor | None:
        """Count the sums over activations, and differentiate them.

        Args:
            inputs: of the dictionary whose activations they are.
            values: `[nnz]` activations, or a tile `[r, d_sae]`.
            latents: `[nnz]` latent of each; None for a tile.
            gradients: receives the gradient of the decoder norms, in W_dec.

        Returns:
            d_values in the shape of values; None where no term is of this kind.
        """
        terms = [(at, t) for at, t in enumerate(self._terms) if isinstance(t, EntryTerm)]
        if not terms:
            return None
        needs = inputs.needs
        leaf = values.detach().requires_grad_(bool(needs))
        norms = inputs.decoder_norms().detach()
        mine = norms if latents is None else norms[latents]
        mine.requires_grad_("W_dec" in needs and any(t.by_norm for _, t in terms))
        with torch.set_grad_enabled(bool(needs)):
            total = values.new_zeros(())
            for at, term in terms:
                value = term.per_entry(leaf * mine if term.by_norm else leaf).sum()
                self.sums[at].add_(value.detach())
                total = total + value / inputs.tokens
        if not total.requires_grad:
            return None
        if not mine.requires_grad:
            return torch.autograd.grad(total, leaf)[0]
        d_values, d_norms = torch.autograd.grad(total, (leaf, mine))
        if latents is not None:
            d_norms = torch.zeros_like(norms).index_put((latents,), d_norms, accumulate=True)
        W_dec = inputs.wide("W_dec")
        share = torch.where(norms > 0, d_norms / norms, 0.0)
        gradients.buffer("W_dec").addcmul_(W_dec, share[:, None])
        return d_values

    def latents(self, own: Callable[[], Tensor]) -> Tensor | None:
        """Gradient `[d_sae]` in the counts of this batch; None where no term depends on them.

        Args:
            own: the counts of the block, which is the whole batch unless the counts are known.
        """
        terms = [(at, t) for at, t in enumerate(self._terms) if isinstance(t, BatchTerm)]
        if not terms or self._d_counts is not None:
            return self._d_counts
        inputs = self._inputs
        if self.counts is None and self.needs_counts:
            self.counts = inputs.whole.counts(own())
        d_sae = inputs.whole.d_sae(inputs.d_sae)
        known = inputs.tensors["b_enc"].new_zeros(d_sae) if self.counts is None else self.counts
        leaf = known.to(inputs.acc).requires_grad_(inputs.bandwidth > 0)
        with torch.enable_grad():
            total = leaf.sum() * 0.0
            for at, term in terms:
                value = term.of_rates(rates(leaf, inputs.tokens, term.counts, term.tokens))
                self.sums[at] = value.detach().double() * inputs.n
                total = total + value
        if total.requires_grad:
            self._d_counts = inputs.whole.part(torch.autograd.grad(total, leaf)[0])
        return self._d_counts


def _of_latents(term: LossTerm) -> bool:
    """Whether the term is a sum over latents, of which each process has its own."""
    apart = isinstance(term, WeightTerm) and term.among_peers == "apart"
    return apart or isinstance(term, EntryTerm)


def _per_token(term: Term, statistics: TokenStatistics) -> Tensor:
    value = term.per_token(statistics)
    if value.shape != statistics.l0.shape:
        raise ValueError(
            f"loss: per_token of the term {term.name!r} must return one value per token, shape "
            f"{tuple(statistics.l0.shape)}, got {tuple(value.shape)}"
        )
    return value
