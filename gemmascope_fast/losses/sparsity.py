"""Sparsity losses: sums over stored entries, per token or of the firing rates of the batch.

The gradients of `l0()` and `counts()` reach the threshold of a JumpReLU through its window, and
nothing else: arXiv 2407.14435, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, check_number
from ..checks import check_decoder
from ..sparse import SparseActs

NORMALISATIONS = ("2/target", "1/target^2")


def l0(acts: SparseActs) -> Tensor:
    """Step penalty: `mean_i l0[i]`, `l0[i]` the active latents of token i.

    Args:
        acts: activations of n tokens; those of a JumpReLU whose threshold is trained.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: `acts` is not a `SparseActs`.

    Source: arXiv 2407.14435, section 3.
    """
    _check_acts("l0", acts)
    return acts.l0().sum() / max(acts.n, 1)


def quadratic_l0(acts: SparseActs, target: float, normalisation: str = "2/target") -> Tensor:
    """Pull of every token's L0 to a target: `mean_i w (l0[i] - target)^2`.

    Args:
        acts: activations of n tokens.
        target: wanted active latents per token, finite, > 0.
        normalisation: w: "2/target" (Gemma Scope 2, SAELens) or "1/target^2".

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or the target not a number.
        ValueError: the target or the normalisation is out of range.

    Source: Gemma Scope 2's training recipe; arXiv 2407.14435, appendix, for the other.
    """
    op = "quadratic_l0"
    _check_acts(op, acts)
    weight = quadratic_weight(op, target, normalisation)
    return weight * (acts.l0() - target).square().sum() / max(acts.n, 1)


def quadratic_mean_l0(
    acts: SparseActs,
    target: float,
    normalisation: str = "2/target",
    *,
    counts: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Pull of the batch's mean L0 to a target: `w (mean_i l0[i] - target)^2`.

    Args:
        acts: activations of n tokens.
        target: wanted mean of active latents, finite, > 0.
        normalisation: w: "2/target" (Gemma Scope 2) or "1/target^2" (dictionary_learning, whose
            form is `(l0 / target - 1)^2`).
        counts: `[d_sae]` firing counts of the whole batch, of which `acts` is a part; else its own.
        tokens: tokens of the whole batch; goes with `counts`.

    Returns:
        A scalar; for an empty batch that of mean L0 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or one of `counts` and `tokens` is missing.

    Source: Gemma Scope 2's training recipe, which leaves open where the square is taken.
    """
    op = "quadratic_mean_l0"
    _check_acts(op, acts)
    weight = quadratic_weight(op, target, normalisation)
    check_totals(op, counts, tokens, acts.d_sae)
    return weight * (rates(acts.counts(), acts.n, counts, tokens).sum() - target).square()


def frequency(
    acts: SparseActs, w0: float, *, counts: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """Penalty on latents that fire often: `sum_j p_j^2 / w0`, p_j the batch's firing rates.

    Args:
        acts: activations of n tokens.
        w0: rate around which the penalty sets in, as a share of tokens, finite, > 0.
        counts: `[d_sae]` firing counts of the whole batch, of which `acts` is a part; else its own.
        tokens: tokens of the whole batch; goes with `counts`.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or one of `counts` and `tokens` is missing.

    Source: Gemma Scope 2's training recipe, the second penalty beside an L0 term.
    """
    op = "frequency"
    _check_acts(op, acts)
    w0 = check_number(op, "w0", w0, positive=True)
    check_totals(op, counts, tokens, acts.d_sae)
    return rates(acts.counts(), acts.n, counts, tokens).square().sum() / w0


def frequency_l0(
    acts: SparseActs, w0: float, *, counts: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """L0 and frequency penalty in one: `sum_j p_j (1 + p_j / w0)`; `sum_j p_j` is the mean L0.

    Args:
        acts: activations of n tokens.
        w0: rate at which the penalty of a latent has doubled, finite, > 0.
        counts: `[d_sae]` firing counts of the whole batch, of which `acts` is a part; else its own.
        tokens: tokens of the whole batch; goes with `counts`.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or one of `counts` and `tokens` is missing.

    Source: Gemma Scope 2's training recipe; the quadratic-frequency penalty that replaces the L0.
    """
    op = "frequency_l0"
    _check_acts(op, acts)
    w0 = check_number(op, "w0", w0, positive=True)
    check_totals(op, counts, tokens, acts.d_sae)
    p = rates(acts.counts(), acts.n, counts, tokens)
    return (p * (1 + p / w0)).sum()


def l1(acts: SparseActs, W_dec: Tensor | None = None) -> Tensor:
    """Activations weighted by their decoder norms: `mean_i sum_j acts[i, j] |W_dec[j]|`.

    The L1 norm, activations being >= 0. At a window entry that is off the derivative is that from
    above, `|W_dec[j]|`, so that the threshold learns from it.

    Args:
        acts: activations of n tokens.
        W_dec: `[d_sae, d_out]`, differentiable; None for norms of 1.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or W_dec not a floating-point tensor.
        ValueError: shapes or devices disagree.

    Source: Conerly et al., Transformer Circuits updates, April 2024.
    """
    values = acts_by_norm("l1", acts, W_dec)
    return values.sum() / max(acts.n, 1)


def tanh(acts: SparseActs, W_dec: Tensor | None = None, scale: float = 4.0) -> Tensor:
    """Saturating L0: `mean_i sum_j tanh(scale * acts[i, j] * |W_dec[j]|)`.

    Args:
        acts: activations of n tokens.
        W_dec: `[d_sae, d_out]`, differentiable; None for norms of 1.
        scale: inverse of the activation at which the penalty saturates, finite, >= 0.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: `acts` is not a `SparseActs`, W_dec not a floating-point tensor, or the scale not
            a number.
        ValueError: shapes or devices disagree, or the scale is out of range.

    Source: Conerly et al., Transformer Circuits updates, January 2025.
    """
    scale = check_number("tanh", "scale", scale)
    values = acts_by_norm("tanh", acts, W_dec)
    return (scale * values).tanh().sum() / max(acts.n, 1)


def rates(own: Tensor, n: int, counts: Tensor | None, tokens: int | None) -> Tensor:
    """`[d_sae]` firing rates of the whole batch, through whose own part gradients flow.

    With totals from elsewhere the gradient is `own / n`'s, so that the mean over equal parts of the
    parts' gradients is the whole batch's.
    """
    if counts is None or tokens is None:
        return own / max(n, 1)
    return counts.to(own) / max(tokens, 1) + (own - own.detach()) / max(n, 1)


def quadratic_weight(op: str, target: Any, normalisation: Any) -> float:
    """The factor of the square."""
    wanted = check_number(op, "target", target, positive=True)
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"{op}: normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}"
        )
    return 2 / wanted if normalisation == "2/target" else 1 / (wanted * wanted)


def check_totals(op: str, counts: Any, tokens: Any, d_sae: int | None = None) -> None:
    """Both totals or neither, `counts` of shape `[d_sae]`."""
    if (counts is None) != (tokens is None):
        missing = "counts" if counts is None else "tokens"
        raise ValueError(f"{op}: counts and tokens go together, {missing} is missing")
    if counts is None:
        return
    check_count(op, "tokens", tokens)
    if not isinstance(counts, Tensor):
        raise TypeError(f"{op}: counts must be a torch.Tensor, got {type(counts).__name__}")
    if counts.dim() != 1 or (d_sae is not None and counts.shape[0] != d_sae):
        expected = "d_sae" if d_sae is None else f"d_sae={d_sae}"
        raise ValueError(f"{op}: counts must have shape [{expected}], got {tuple(counts.shape)}")
    if counts.requires_grad:
        raise ValueError(f"{op}: counts are constants, and these require grad: detach them")


def acts_by_norm(op: str, acts: SparseActs, W_dec: Tensor | None) -> Tensor:
    """`[nnz]` activations times the norms of their decoder rows."""
    if W_dec is None:
        _check_acts(op, acts)
    else:
        check_decoder(op, acts, W_dec)
    values = acts.values[: acts.nnz]
    if W_dec is None:
        return values
    wide = W_dec.to(torch.promote_types(W_dec.dtype, values.dtype))
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return values * norms[acts.indices[: acts.nnz].long()]


def _check_acts(op: str, acts: Any) -> None:
    if not isinstance(acts, SparseActs):
        raise TypeError(f"{op}: acts must be a SparseActs, got {type(acts).__name__}")
