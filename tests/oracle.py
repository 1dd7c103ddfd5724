"""The one oracle: what results must be, and how far a result may be from the truth.

The definitions are written here a second time, in NumPy loops and dense float64 autograd, so that
`reference.py` is tested too. A floating-point result passes when its error is at most twice that of
plain PyTorch in the same dtype, plus a rounding of the largest true element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ---- closeness


def assert_close_to_truth(
    ours: Tensor,
    theirs: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    name: str = "result",
    terms: int = 1,
) -> None:
    """`|ours - truth| <= 2 max|theirs - truth| + atol max|truth|`; NaN and Inf agree first.

    `atol = eps(dtype) + eps(float32) * sqrt(terms)`: one rounding, and a sum in another order.

    Args:
        ours: the tested result.
        theirs: plain PyTorch's result in `dtype`.
        truth: the float64 result.
        dtype: what the result is rounded to.
        name: for the message.
        terms: how many products an element sums in float32.
    """
    assert ours.shape == truth.shape, f"{name}: shape {ours.shape}, expected {truth.shape}"
    mine, other, true = (t.detach().double() for t in (ours, theirs, truth))
    finite = true.isfinite()
    special = ~finite & ~((mine == true) | (mine.isnan() & true.isnan()))
    laundered = special | (finite & ~mine.isfinite())
    if laundered.any():
        at = tuple(laundered.nonzero()[0].tolist())
        raise AssertionError(f"{name}{list(at)}: got {mine[at]}, expected {true[at]}")
    if not finite.any():
        return
    error = torch.where(finite, (mine - true).abs(), 0.0)
    their_error = torch.where(finite & other.isfinite(), (other - true).abs(), 0.0).max()
    largest = torch.where(finite, true.abs(), 0.0).max()
    order = 0.0 if dtype == torch.float64 else 2.0**-23 * math.sqrt(terms)
    allowed = 2 * their_error + (torch.finfo(dtype).eps + order) * largest
    if error.max() > allowed:
        at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), tuple(error.shape)))
        raise AssertionError(
            f"{name}{list(at)}: got {mine[at]}, expected {true[at]}: off by {error[at]:.3g}, "
            f"allowed {allowed:.3g} (plain PyTorch is off by {their_error:.3g})"
        )


def assert_same(ours: Tensor | None, expected: Tensor | None, name: str = "result") -> None:
    """Equal bit for bit (NaN equals NaN, -0.0 equals 0.0), shape and dtype included."""
    assert (ours is None) == (expected is None), f"{name}: got {ours}, expected {expected}"
    if ours is None or expected is None:
        return
    assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
    assert ours.dtype == expected.dtype, f"{name}: dtype {ours.dtype}, expected {expected.dtype}"
    differs = ours != expected
    if ours.is_floating_point():
        differs &= ~(ours.isnan() & expected.isnan())
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: got {ours[at].item()}, expected {expected[at].item()}; "
            f"{int(differs.sum())} of {ours.numel()} elements differ"
        )


def assert_all_same(
    ours: Sequence[Any], expected: Sequence[Any], names: Sequence[str] | None = None
) -> None:
    """`assert_same` over the outputs of one op."""
    assert len(ours) == len(expected)
    labels = [f"output {i}" for i in range(len(ours))] if names is None else names
    for mine, other, label in zip(ours, expected, labels, strict=True):
        assert_same(mine, other, label)


# ---- pre-activations and their rounding


def exact_pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """`x @ W_enc + b_enc` in float64."""
    return x.double() @ W_enc.double() + b_enc.double()


def accumulation_bound(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """How far a float32 accumulation of `pre` may be from the truth: `[n, d_sae]`."""
    magnitude = x.double().abs() @ W_enc.double().abs() + b_enc.double().abs()
    return 2.0**-24 * (math.sqrt(x.shape[1]) + 2) * magnitude


def compare_supports(stored: Tensor, wanted: Tensor, doubtful: Tensor) -> Tensor:
    """Assert `stored == wanted` outside `doubtful`; return where both store.

    Args:
        stored: `[n, d_sae]` bool, the tested support.
        wanted: `[n, d_sae]` bool, the support of the truth.
        doubtful: `[n, d_sae]` bool, where rounding alone may decide.
    """
    wrong = (stored != wanted) & ~doubtful
    if wrong.any():
        row, latent = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"row {row}, latent {latent}: stored is {bool(stored[row, latent])}, expected "
            f"{bool(wanted[row, latent])}; {int(wrong.sum())} of {wrong.numel()} pairs are wrong"
        )
    return stored & wanted


# ---- definitions of the encoders, on float32 or float64 pre-activations


def jumprelu_support(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, ...]:
    """`(stored, values, gate)`, each `[n, d_sae]`, by the definition in docs/design.md."""
    p, theta = pre.numpy(), threshold.to(pre.dtype).numpy()
    half = p.dtype.type(bandwidth / 2)
    invalid = np.isnan(p) | np.isnan(theta)
    first = invalid & (np.cumsum(invalid, axis=1) == 1)
    active = ~invalid & (p > theta)
    window = ~invalid & (p > theta - half) if bandwidth > 0 else np.zeros_like(active)
    values = np.where(first, p.dtype.type(np.nan), np.where(active, p, p.dtype.type(0)))
    gate = (first | active).astype(p.dtype)
    return tuple(torch.from_numpy(t) for t in (first | active | window, values, gate))


def _rank(pre: float) -> float:
    """Sort key of `relu(pre)`, largest first: NaN, Inf, ..., 0."""
    return -math.inf if math.isnan(pre) else -max(pre, 0.0)


def _tie(pre: float) -> bool:
    return not math.isnan(pre)  # NaN stands before Inf


def _gated(pre: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fires = stored & ~(pre <= 0)
    return stored, torch.where(fires, pre, 0.0), fires.to(pre.dtype)


def topk_support(pre: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(stored, values, gate)` of TopK, each `[n, d_sae]`."""
    stored = torch.zeros_like(pre, dtype=torch.bool)
    for i, row in enumerate(pre.tolist()):
        order = sorted(range(len(row)), key=lambda j, row=row: (_rank(row[j]), _tie(row[j]), j))
        stored[i, order[:k]] = True
    return _gated(pre, stored)


def batchtopk_support(pre: Tensor, k: float) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """`((stored, values, gate), threshold)` of BatchTopK."""
    flat = pre.flatten().tolist()
    count = int(k * pre.shape[0])
    order = sorted(
        (e for e, v in enumerate(flat) if not v <= 0),
        key=lambda e: (_rank(flat[e]), _tie(flat[e]), e),
    )
    chosen = order[:count]
    stored = torch.zeros(pre.numel(), dtype=torch.bool)
    stored[chosen] = True
    threshold = flat[chosen[-1]] if chosen and len(chosen) == count else 0.0
    return _gated(pre, stored.view_as(pre)), threshold


# ---- CSR


def to_dense(result: Sequence[Tensor], d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(stored, values, gate)` of CSR outputs, each `[n, d_sae]`."""
    offsets, indices, values, gate = (t.detach() for t in result[:4])
    n = offsets.shape[0] - 1
    stored = torch.zeros(n, d_sae, dtype=torch.bool)
    dense, dense_gate = values.new_zeros(n, d_sae), values.new_zeros(n, d_sae)
    for i in range(n):
        entry = slice(int(offsets[i]), int(offsets[i + 1]))
        latents = indices[entry].long()
        stored[i, latents] = True
        dense[i, latents], dense_gate[i, latents] = values[entry], gate[entry]
    return stored, dense, dense_gate


def check_csr(result: Sequence[Tensor], n: int, d_sae: int) -> None:
    """Structure of an encoder's outputs: dtypes, order, range, zero padding, feature view."""
    offsets, indices, values, gate = result[:4]
    feature_offsets, permutation = result[-2:]
    assert (offsets.dtype, indices.dtype) == (torch.int64, torch.int32)
    assert values.dtype == gate.dtype
    assert offsets.shape == (n + 1,) and offsets[0] == 0
    nnz = int(offsets[-1])
    assert indices.shape == values.shape == gate.shape and nnz <= indices.shape[0]
    lengths = offsets.diff()
    assert bool((lengths >= 0).all())
    rows = torch.repeat_interleave(torch.arange(n), lengths)
    keys = rows * max(d_sae, 1) + indices[:nnz]
    assert bool((keys.diff() > 0).all()), "latents must ascend inside a row"
    assert bool(((indices[:nnz] >= 0) & (indices[:nnz] < d_sae)).all())
    for t in (indices, values, gate):
        assert not t[nnz:].any(), "padding must be zero"
    if feature_offsets.numel():
        check_feature_view(feature_offsets, permutation, offsets, indices, d_sae)


def check_feature_view(
    feature_offsets: Tensor, permutation: Tensor, offsets: Tensor, indices: Tensor, d_sae: int
) -> None:
    """The view lists every entry once, by latent, tokens ascending; zeros after."""
    nnz = int(offsets[-1])
    latents = indices[:nnz].tolist()
    order = sorted(range(nnz), key=lambda e: (latents[e], e))
    counts = np.bincount(np.asarray(latents, dtype=np.int64), minlength=d_sae)
    assert feature_offsets.tolist() == [0, *np.cumsum(counts).tolist()]
    assert permutation.shape == indices.shape and permutation.dtype == torch.int64
    assert permutation.tolist() == order + [0] * (indices.shape[0] - nnz)


def assert_entries(result: Sequence[Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """An encoder's outputs are exactly `(stored, values, gate)`."""
    n, d_sae = expected[0].shape
    check_csr(result, n, d_sae)
    for mine, wanted, name in zip(
        to_dense(result, d_sae), expected, ("stored", "values", "gate"), strict=True
    ):
        assert_same(mine, wanted.to(mine.dtype), name)


# ---- dense autograd in float64


class _JumpReLU(torch.autograd.Function):
    """Values and gate with the straight-through gradients of arXiv 2407.14435, section 3."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        gate = (pre > threshold).to(pre.dtype)
        return pre * gate, gate

    @staticmethod
    def backward(ctx: Any, d_acts: Tensor, d_gate: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = (((pre - threshold) / ctx.bandwidth).abs() < 0.5).to(pre.dtype)
        d_threshold = -(window / ctx.bandwidth) * (threshold * d_acts + d_gate)
        return d_acts * (pre > threshold), d_threshold.sum(0), None


def dense_jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """`(acts, gate)`, each `[n, d_sae]`, differentiable in both arguments."""
    return _JumpReLU.apply(pre, threshold, bandwidth)


def dense_selected(pre: Tensor, support: Callable[[Tensor], Tensor]) -> Tensor:
    """`relu(pre)` on the selected pairs, 0 elsewhere; the selection is a constant."""
    return torch.relu(pre) * support(pre.detach()).to(pre.dtype)
