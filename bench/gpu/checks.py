"""What every benchmark asserts before it times: a few rows against float32 or float64 sums.

Products of bfloat16 numbers are exact in float32, so a right sum over d = 5376 is within 1e-4 of
the truth and one rounded to bfloat16 on the way is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import BANDWIDTH, CHUNK, Entries, Problem

EXACT = 1e-3
"""Largest error of a float32 pre-activation of order 1."""
ROUNDED = 2.0**-7
"""Largest error of a bfloat16 result, relative to the largest element beside it."""


def sampled(n: int, count: int = 4) -> list[int]:
    """First, last and evenly spread positions in `range(n)`."""
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)}) if n else []


def exact_pre(p: Problem, rows: Sequence[int]) -> Tensor:
    """`[len(rows), F]` float32 pre-activations, in blocks of latents."""
    x = p.x[list(rows)].float()
    blocks = [x @ block.float().t() for block in p.W_enc.t().split(CHUNK)]
    return torch.cat(blocks, dim=1) + p.b_enc


def encoded(
    p: Problem, offsets: Tensor, indices: Tensor, values: Tensor, gate: Tensor | None = None
) -> float:
    """Assert the entries of sampled rows of a JumpReLU encoder; returns the largest error.

    With `gate`, entries off the gate lie in the window below the threshold and are worth 0.
    """
    worst = 0.0
    rows = sampled(p.x.shape[0])
    gate = torch.ones_like(values) if gate is None else gate
    for row, pre in zip(rows, exact_pre(p, rows), strict=True):
        latents, found = _row(offsets, indices, values, row)
        active = _row(offsets, indices, gate, row)[1] > 0
        margin = pre - p.threshold
        missing = (margin > EXACT).nonzero()[:, 0]
        below = margin[latents[~active]]
        assert bool(torch.isin(missing, latents[active]).all()), f"row {row} lacks active latents"
        assert bool((margin[latents[active]] > -EXACT).all()), f"row {row} has inactive latents"
        assert bool((below > -BANDWIDTH / 2 - EXACT).all()), f"row {row} leaves the window"
        assert bool((found[~active] == 0).all()), f"row {row} has values off the gate"
        assert bool((latents.diff() > 0).all()), f"latents of row {row} do not ascend"
        worst = max(worst, _largest((found - pre[latents])[active]))
    assert worst <= EXACT, f"a value is off by {worst:.2e}"
    return worst


def selected(p: Problem, k: int, offsets: Tensor, indices: Tensor, values: Tensor) -> float:
    """Assert the sampled rows of a TopK encoder; returns the largest error."""
    worst = 0.0
    rows = sampled(p.x.shape[0])
    for row, pre in zip(rows, exact_pre(p, rows), strict=True):
        latents, found = _row(offsets, indices, values, row)
        best = pre.relu().topk(k).values
        assert latents.shape[0] == k, f"row {row} has {latents.shape[0]} entries, expected {k}"
        worst = max(worst, _largest(found.sort(descending=True).values - best))
        worst = max(worst, _largest(found - pre[latents].relu()))
    assert worst <= EXACT, f"a value is off by {worst:.2e}"
    return worst


def decoded(p: Problem, e: Entries, recon: Tensor) -> float:
    """Assert sampled rows of a reconstruction; returns the largest relative error."""
    worst = 0.0
    for row in sampled(recon.shape[0]):
        latents, values = _row(*e.csr, row)
        truth = values.double() @ p.W_dec[latents].double() + p.b_dec.double()
        worst = max(worst, close(recon[row], truth, f"recon[{row}]"))
    return worst


def differentiated(
    p: Problem, e: Entries, d_recon: Tensor, grads: Sequence[Tensor], bandwidth: float = BANDWIDTH
) -> float:
    """Assert d_W_enc, d_b_enc, d_threshold, d_W_dec of a few touched latents, and d_b_dec.

    The latent that fires most is among them.

    Args:
        p: the problem.
        e: its entries.
        d_recon: `[n, d]` gradient of the reconstruction.
        grads: the five gradients in the order above.
        bandwidth: of the window; at 0 there is no d_threshold.
    """
    d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec = grads
    worst = close(d_b_dec, d_recon.double().sum(0), "d_b_dec")
    counts = e.feature_offsets.diff()
    touched = (counts > 0).nonzero()[:, 0]
    some = {int(touched[at]) for at in sampled(touched.shape[0], 6)}
    for j in sorted(some | ({int(counts.argmax())} if some else set())):
        mine = e.permutation[e.feature_offsets[j] : e.feature_offsets[j + 1]]
        rows, values, gate = e.rows[mine], e.values[mine].double(), e.gate[mine].double()
        seen = d_recon[rows].double()
        d_value = seen @ p.W_dec[j].double()
        d_pre, theta = d_value * gate, p.threshold[j].double()
        # sums cancel, so a sum's error is measured against its largest term
        found = [
            (d_W_dec[j], values @ seen, _largest(values[:, None] * seen), "d_W_dec"),
            (d_W_enc[:, j], d_pre @ p.x[rows].double(), _largest(d_pre), "d_W_enc"),
            (d_b_enc[j], d_pre.sum(), _largest(d_pre), "d_b_enc"),
        ]
        if bandwidth:
            terms = theta * d_value / bandwidth
            window = (gate == 0) | (values < theta + bandwidth / 2)
            d_theta = -(window * terms).sum()
            found.append((d_threshold[j], d_theta, _largest(terms), "d_threshold"))
        for got, truth, scale, name in found:
            worst = max(worst, close(got, truth, f"{name} of latent {j}", scale))
    return worst


def close(got: Tensor, truth: Tensor, name: str, scale: float = 0.0) -> float:
    """Assert `got` to bfloat16's precision of the largest element; returns the relative error."""
    largest = max(_largest(truth), scale, 1e-30)
    error = _largest(got.double() - truth) / largest
    assert error <= ROUNDED, f"{name} is off by {error:.2e} of its largest element"
    return error


def _row(offsets: Tensor, indices: Tensor, values: Tensor, row: int) -> tuple[Tensor, Tensor]:
    start, end = int(offsets[row]), int(offsets[row + 1])
    return indices[start:end].long(), values[start:end]


def _largest(t: Tensor) -> float:
    """Largest magnitude; a NaN counts as infinite, so that no comparison passes it."""
    if t.numel() == 0:
        return 0.0
    largest = float(t.abs().max())
    return largest if largest == largest else float("inf")
