"""Parts `decode` and `backward`: what stands on memory bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops

from . import checks, dense
from .context import Context, Shape
from .encoders import copy_bytes, device_of, estimate
from .problem import (
    CHUNK,
    ENTRY_BANDWIDTH,
    Entries,
    Problem,
    dense_acts,
    dense_pre,
    entries,
    problem,
)
from .rows import OURS, backward_bytes, compose, decode_bytes
from .splits import UNSPLIT, unsplit
from .targets import OURS_ROWS
from .timing import Call, compare, copy_rate, free, or_reason
from .triton import TRITON, call_of

GRADIENTS = ("d_W_enc", "d_b_enc", "d_threshold", "d_W_dec")


def random_gradient(p: Problem) -> Tensor:
    return torch.randn(p.x.shape, device=p.x.device).to(p.x.dtype) / p.x.shape[0]


# ---- decode


def decode(ctx: Context) -> None:
    """`decode` against the dense product, `embedding_bag` and `torch.sparse`."""
    rate = copy_rate(device_of(ctx), copy_bytes(ctx))
    for shape in ctx.settings.shapes():
        ctx.row(
            shape.name, lambda shape=shape: _decode(ctx, shape, rate), estimate(ctx, shape, 2),
            shape=shape.json(),
        )  # fmt: skip
        free(device_of(ctx))


def _decode(ctx: Context, shape: Shape, rate: float) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device, encoder=False)
    e = entries(shape, p.threshold)
    op = ops.overload("decode", p.W_dec)
    args = (*e.csr, p.W_dec, p.b_dec)
    call = lambda *view: op(*args, *view, p.W_dec.dtype)  # noqa: E731
    error = checks.decoded(p, e, call(None, None))
    acts = or_reason(dense.fits(shape, device, 1, 1), lambda: dense_acts(e, shape, p.W_dec.dtype))
    times = compare(
        {
            OURS: lambda: call(None, None),
            "ours, with the feature-major view": lambda: call(*e.view),
            "dense eager": acts if isinstance(acts, str) else (lambda: dense.decode(p, acts)),
            "embedding_bag": or_reason("", lambda: dense.bag(p, e)),
            "torch.sparse": or_reason("", lambda: dense.csr(p, e, shape)),
            TRITON: call_of("decode", device, *args, None, None, p.W_dec.dtype),
        },
        device,
        ctx.settings.row_seconds,
    )
    traffic = decode_bytes(shape, e.nnz, e.touched)
    return compose(
        *("decode", shape, times),
        floor_s=traffic["gathered"] / rate,
        floor="a copy of the gathered bytes",
        traffic=traffic,
        **{"nnz": e.nnz, "touched": e.touched, "l0": e.nnz / shape.n, "error": error},
        copy_gb_per_s=rate / 1e9,
    )


# ---- backward


def backward(ctx: Context) -> None:
    """`sae_backward`, all weight gradients, against the dense ones, eager and compiled."""
    rate = copy_rate(device_of(ctx), copy_bytes(ctx))
    compiled = dense.compiled(ctx.settings, dense.backward)
    for shape in ctx.settings.shapes():
        seconds = estimate(ctx, shape, 8) + (0 if ctx.settings.quick or ctx.settings.brief else 20)
        ctx.row(
            shape.name, lambda shape=shape: _backward(ctx, shape, rate, compiled), seconds,
            shape=shape.json(),
        )  # fmt: skip
        free(device_of(ctx))


def _backward(ctx: Context, shape: Shape, rate: float, compiled: Any) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device)
    e = entries(shape, p.threshold)
    d_recon = random_gradient(p)
    ours = sparse_backward(p, e, d_recon)
    grads = ours()
    error = checks.differentiated(p, e, d_recon, grads, ENTRY_BANDWIDTH)
    same = same_rows(e, grads, row_sparse_backward(p, e, d_recon)())
    del grads
    free(device)
    reason = dense.fits(shape, device, 4, 4)
    pre = or_reason(reason, lambda: dense_pre(e, shape, p.threshold, p.x.dtype))
    missing = pre if isinstance(pre, str) else None
    times = compare(
        {
            OURS: ours,
            UNSPLIT: unsplit(device, ours),
            OURS_ROWS: row_sparse_backward(p, e, d_recon),
            "ours, composed ops": composed_backward(p, e, d_recon),
            "dense eager": missing or (lambda: dense.backward(p, pre, d_recon, ENTRY_BANDWIDTH)),
            "torch.compile": dense.compiles(ctx.settings, missing or "")
            or (lambda: compiled(p, pre, d_recon, ENTRY_BANDWIDTH)),
            TRITON: triton_backward(p, e, d_recon),
        },
        device,
        ctx.settings.row_seconds,
    )
    traffic = backward_bytes(shape, e.nnz, e.touched)
    return compose(
        *("backward", shape, times),
        floor_s=traffic["gathered"] / rate,
        floor="a copy of the gathered bytes",
        traffic=traffic,
        **{"nnz": e.nnz, "touched": e.touched, "l0": e.nnz / shape.n, "error": error},
        **{"copy_gb_per_s": rate / 1e9, "rows_equal_to_the_bit": same},
    )


def sparse_backward(p: Problem, e: Entries, d_recon: Tensor) -> Call:
    """`sae_backward` without d_x; returns the five gradients of the parameters."""
    op, args = ops.overload("sae_backward", p.x, p.W_enc), _backward_args(p, e, d_recon)
    return lambda: op(*args)[1:]


def triton_backward(p: Problem, e: Entries, d_recon: Tensor) -> Call | str:
    """The same by the Triton kernel."""
    return call_of("sae_backward", p.x.device, *_backward_args(p, e, d_recon))


def _backward_args(p: Problem, e: Entries, d_recon: Tensor) -> tuple[Any, ...]:
    fixed = (p.x, p.W_enc, p.threshold, ENTRY_BANDWIDTH, p.W_dec, d_recon[None])
    return (*fixed, [p.W_dec.shape[0]], *e.csr, e.gate, None, None, *e.view, False)


def row_sparse_backward(p: Problem, e: Entries, d_recon: Tensor) -> Call:
    """The same of the touched latents alone: U latents, their `[U, d]` rows, the vectors.

    Returns latents, d_W_enc `[d, U]`, d_b_enc, d_threshold, d_W_dec `[U, d]`, d_b_dec. Finding and
    renumbering the latents and the gather of W_dec belong to it. Of W_enc only shape and dtype
    matter without d_x.
    """
    op = ops.overload("sae_backward", p.x, p.W_enc)

    def call() -> tuple[Tensor, ...]:
        fired = e.feature_offsets.diff() > 0
        latents = fired.nonzero()[:, 0]
        rank = (fired.cumsum(0) - 1).to(torch.int32)
        starts = torch.cat([e.feature_offsets[:1], e.feature_offsets[1:][latents]])
        entered = (e.offsets, rank[e.indices.long()], e.values, e.gate, None, None, starts)
        weights = (p.W_enc[:, : latents.shape[0]], p.threshold[latents], ENTRY_BANDWIDTH)
        shaped = (p.W_dec[latents], d_recon[None], [latents.shape[0]])
        _, *grads = op(p.x, *weights, *shaped, *entered, e.permutation, False)
        return (latents, *grads)

    return call


def same_rows(e: Entries, dense_layout: Sequence[Tensor], row_sparse: Sequence[Tensor]) -> bool:
    """Assert that both layouts hold the same gradients; returns whether they do to the bit.

    A few latents are compared to rounding and all of them, block by block, to the bit: the split
    for the latents that fire most may choose others when there are fewer of them.
    """
    d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec = dense_layout
    latents, *rows = row_sparse
    whole = (d_W_enc.t(), d_b_enc, d_threshold, d_W_dec)
    apart = (rows[0].t(), *rows[1:4])
    assert torch.equal(latents, (e.feature_offsets.diff() > 0).nonzero()[:, 0]), "other latents"
    checks.close(rows[4], d_b_dec.double(), "row-sparse d_b_dec")
    some = checks.sampled(latents.shape[0], 64)
    equal = torch.equal(rows[4], d_b_dec)
    for name, there, here in zip(GRADIENTS, whole, apart, strict=True):
        checks.close(here[some], there[latents[some]].double(), f"row-sparse {name}")
        blocks = zip(latents.split(CHUNK), here.split(CHUNK), strict=True)
        equal = all(torch.equal(there[at], block) for at, block in blocks) and equal
    return equal


def composed_backward(p: Problem, e: Entries, d_recon: Tensor) -> Call:
    """The same through `decode_backward` and `encode_backward`."""
    first, second = (ops.overload(f"{side}_backward", p.x) for side in ("decode", "encode"))

    def call() -> tuple[Tensor, ...]:
        d_values, d_W_dec, d_b_dec = first(d_recon, *e.csr, p.W_dec, *e.view, True, True, True)
        inputs = (d_values, None, p.x, p.W_enc, p.threshold, ENTRY_BANDWIDTH)
        _, *encoder = second(*inputs, *e.csr, e.gate, *e.view, False, True, True, True)
        return (*encoder, d_W_dec, d_b_dec)

    return call
