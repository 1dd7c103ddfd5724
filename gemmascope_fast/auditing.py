"""`audit`: an encoder's entries against the whole product, for a sample of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_count, check_number
from .checks import check_encoder, check_vector
from .packing import PackedEncoder
from .sparse import SparseActs

BLOCK = 8192
"""Latents whose pre-activations are held at a time."""
ROUNDING = 2.0**-20
"""Of the sum of the magnitudes of a pre-activation's terms: what float32 may be away from it."""


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        tokens: tokens looked at.
        entries: pairs of a token and a latent whose pre-activation is above the limit for sure.
        missed: those of them that are not stored.
        extra: stored pairs whose pre-activation is below the limit for sure.
        near: pairs within rounding of their limit, which may be stored or not.
    """

    tokens: int
    entries: int
    missed: int
    extra: int
    near: int

    @property
    def recall(self) -> float:
        """Share of the entries that are stored."""
        return 1 - self.missed / max(self.entries, 1)

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.missed} of {self.entries} entries missed and {self.extra} too many in "
            f"{self.tokens} tokens ({self.near} within rounding of their limit)"
        )


@torch.no_grad()
def audit(
    acts: SparseActs,
    x: Tensor,
    W_enc: Tensor | PackedEncoder,
    b_enc: Tensor,
    threshold: Tensor | None = None,
    *,
    bandwidth: float = 0.0,
    tokens: int = 64,
    seed: int = 0,
) -> Audit:
    """Compare what an encoder stored for some tokens with their exact pre-activations.

    The pre-activations are float64 sums of all products. A pair is missed if its pre-activation
    exceeds its limit by more than float32 rounds and it is not stored; pairs that are NaN are not
    looked at. For results of `pack(precision="screened")` every so many steps.

        limit = threshold - bandwidth / 2                  jumprelu_encode
        limit = the smallest activation of the token       topk_encode
        limit = acts.threshold                             batchtopk_encode

    Args:
        acts: the result of the encoder.
        x: `[*batch, d_in]`.
        W_enc: `[d_in, d_sae]`, or packed.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]`, of `jumprelu_encode`; None for the others.
        bandwidth: width of the window if its entries were stored, else 0.
        tokens: size of the sample, without replacement.
        seed: of the sample.

    Returns:
        An `Audit`; the device is waited for.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes disagree, or `tokens` or `bandwidth` is out of range.
    """
    op = "audit"
    W_enc = W_enc.W_enc if isinstance(W_enc, PackedEncoder) else W_enc
    check_encoder(op, x, W_enc, b_enc)
    if threshold is not None:
        check_vector(op, "threshold", threshold, W_enc.shape[1], W_enc)
    check_count(op, "tokens", tokens)
    half = check_number(op, "bandwidth", bandwidth) / 2
    if not isinstance(acts, SparseActs):
        raise TypeError(f"{op}: acts must be a SparseActs, got {type(acts).__name__}")
    if acts.shape != (*x.shape[:-1], W_enc.shape[1]):
        raise ValueError(f"{op}: acts has shape {acts.shape}, x and W_enc have other sizes")
    flat = x.reshape(-1, x.shape[-1])
    chosen = torch.randperm(
        flat.shape[0], generator=torch.Generator().manual_seed(seed), device="cpu"
    )[:tokens]
    rows = chosen.sort().values.to(x.device)
    stored, least = _stored(acts, rows, selected=threshold is None)
    limits = least if threshold is None else (threshold.double() - half)[None]
    counts = torch.zeros(4, dtype=torch.int64, device=x.device)
    given = flat[rows].double()
    for begin in range(0, W_enc.shape[1], BLOCK):
        end = min(begin + BLOCK, W_enc.shape[1])
        weights, bias = W_enc[:, begin:end].double(), b_enc[begin:end].double()
        limit = limits[:, begin:end] if limits.shape[1] > 1 else limits
        margin = given @ weights + bias - limit
        slack = ROUNDING * (given.abs() @ weights.abs() + bias.abs())
        has = stored[:, begin:end]
        above, below = margin > slack, margin < -slack
        found = (above, above & ~has, below & has, margin.abs() <= slack)
        counts += torch.stack([pairs.sum() for pairs in found])
    return Audit(len(rows), *counts.tolist())


def _stored(acts: SparseActs, rows: Tensor, selected: bool) -> tuple[Tensor, Tensor]:
    """`[len(rows), d_sae]` bool, which pairs of these tokens are stored; `[len(rows), 1]` limits.

    Of a selection only what is active counts as stored, and the limit is the least of it, or 0
    where a token has entries that are not active.
    """
    mask = torch.zeros(len(rows), acts.shape[-1], dtype=torch.bool, device=rows.device)
    begin, count = acts.offsets[rows], acts.offsets[rows + 1] - acts.offsets[rows]
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    first = count.cumsum(0) - count
    entry = begin[row] + torch.arange(len(row), device=rows.device) - first[row]
    mask[row, acts.indices[entry].long()] = acts.gate[entry] > 0 if selected else True
    least = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    if acts.threshold is not None:
        least[:] = acts.threshold.double()
    else:
        least.scatter_reduce_(0, row, acts.values[entry].double(), "amin")
    return mask, least[:, None]
