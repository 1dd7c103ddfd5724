"""Part `sparsify`: decode and gradients against the Triton kernels of EleutherAI's sparsify.

Both sides compute on the same TopK entries, k = L0 distinct latents per token. Its decoder is
`xformers_embedding_bag`; its gradients are those of its decoder and of `fused_encoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops

from . import checks, dense, sparsify_files
from .context import FIRINGS, Context, Shape, Skip
from .encoders import copy_bytes, device_of, estimate
from .passes import random_gradient
from .problem import Entries, Problem, firing_rates, problem
from .rows import OURS, backward_bytes, compose, decode_bytes
from .targets import SPARSIFY
from .timing import Call, compare, copy_rate, free, or_reason

NEAR = 2.0**-5
"""Largest difference of its matrices from float64 or our bfloat16 ones, relative to the largest
element: it adds in bfloat16, and is 1.7 % off where a latent has 32 entries."""
NEAR_BIAS = 2.0**-4
"""The same of its encoder bias, whose sums are rounded to bfloat16 term by term: 2^-5.8 of 64."""


def sparsify(ctx: Context) -> None:
    """`decode` of drawn entries, `sae_backward` of those that sparsify's encoder finds."""
    rate = copy_rate(device_of(ctx), copy_bytes(ctx))
    for kind, measure, products in (("decode", _decode, 2), ("gradients", _gradients, 12)):
        for shape in ctx.settings.shapes(("uniform",) if kind == "gradients" else FIRINGS):
            if shape.l0 != ctx.settings.l0s[0]:
                continue
            ctx.row(
                f"{kind} {shape.name}",
                lambda shape=shape, measure=measure: measure(ctx, shape, rate),
                estimate(ctx, shape, products),
                shape=shape.json(),
            )
            free(device_of(ctx))


# ---- decode


def _decode(ctx: Context, shape: Shape, rate: float) -> dict[str, Any]:
    theirs = sparsify_files.load("xformers").xformers_embedding_bag
    device = device_of(ctx)
    p = problem(shape, device, encoder=False)
    latents = drawn(shape, device)
    values = (torch.randn(latents.shape, device=device).abs() + 0.1).to(p.W_dec.dtype)
    e = entries_of_rows(latents, values, shape.d_sae)
    op = ops.overload("decode", p.W_dec)
    ours = lambda: op(*e.csr, p.W_dec, p.b_dec, None, None, p.W_dec.dtype)  # noqa: E731
    error = checks.decoded(p, e, ours())
    bag = without_gradient(lambda: theirs(latents, p.W_dec, values))
    told = or_reason("", lambda: _reconstructed(p, latents, values, bag()))
    contenders: dict[str, Call | str] = {OURS: ours}
    contenders[SPARSIFY] = told if isinstance(told, str) else bag
    times = compare(contenders, device, ctx.settings.row_seconds)
    traffic = decode_bytes(shape, e.nnz, e.touched)
    return compose(
        *("sparsify decode", shape, times),
        floor_s=traffic["gathered"] / rate,
        floor="a copy of the gathered bytes",
        traffic=traffic,
        **{"nnz": e.nnz, "touched": e.touched, "l0": e.nnz / shape.n, "error": error},
        **{"error_of_sparsify": told, "copy_gb_per_s": rate / 1e9},
    )


def without_gradient(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call under `torch.no_grad()`."""

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def _reconstructed(p: Problem, latents: Tensor, values: Tensor, recon: Tensor) -> float:
    """Assert sampled rows of sparsify's reconstruction, which has no bias."""
    rows = checks.sampled(recon.shape[0])
    truth = [values[r].double() @ p.W_dec[latents[r]].double() for r in rows]
    return near(recon[rows], torch.stack(truth), "sparsify's reconstruction")


# ---- gradients


def _gradients(ctx: Context, shape: Shape, rate: float) -> dict[str, Any]:
    device = device_of(ctx)
    sparsify_files.load("xformers")
    if reason := dense.fits(shape, device, 3, 5):
        raise Skip(reason)
    p = problem(shape, device)
    d_recon = random_gradient(p)
    made = or_reason("", lambda: their_gradients(p, d_recon, shape.l0))
    if isinstance(made, str):
        raise Skip(f"sparsify's forward pass: {made}")
    latents, values, theirs = made
    free(device)
    e = entries_of_rows(latents, values, shape.d_sae)
    ours = gradients(p, e, d_recon)
    error = checks.differentiated(p, e, d_recon, ours(), 0.0)
    told = or_reason("", lambda: differing(e, ours(), theirs()))
    free(device)
    times = compare(
        {
            OURS: ours,
            "ours, with the encoder's feature-major view": gradients(p, e, d_recon, e.view),
            SPARSIFY: told if isinstance(told, str) else theirs,
        },
        device,
        ctx.settings.row_seconds,
    )
    traffic = backward_bytes(shape, e.nnz, e.touched)
    return compose(
        *("sparsify gradients", shape, times),
        floor_s=traffic["gathered"] / rate,
        floor="a copy of the gathered bytes",
        traffic=traffic,
        **{"nnz": e.nnz, "touched": e.touched, "l0": e.nnz / shape.n, "error": error},
        **{"error_of_sparsify": told, "copy_gb_per_s": rate / 1e9},
    )


def gradients(
    p: Problem, e: Entries, d_recon: Tensor, view: tuple[Tensor, Tensor] | None = None
) -> Call:
    """The five gradients by `sae_backward`; without `view` sorting by latent belongs to the call.

    sparsify sorts in its backward pass too.
    """
    backward, d_sae = ops.overload("sae_backward", p.x, p.W_enc), p.W_dec.shape[0]
    by_feature = ops.overload("by_feature", e.offsets)
    fixed = (p.x, p.W_enc, None, 0.0, p.W_dec, d_recon[None], [d_sae], *e.csr, e.gate, None, None)

    def call() -> tuple[Tensor, ...]:
        by_latent = view or by_feature(e.offsets, e.indices, d_sae)
        return tuple(backward(*fixed, *by_latent, False)[1:])

    return call


def their_gradients(p: Problem, d_recon: Tensor, k: int) -> tuple[Tensor, Tensor, Call]:
    """Latents and values `[n, k]` of sparsify's encoder, and its gradients of that forward pass.

    The call returns d_W_enc `[d_sae, d]`, d_b_enc, d_W_dec.
    """
    decode = sparsify_files.load("xformers").xformers_embedding_bag
    encode = sparsify_files.load("fused_encoder").fused_encoder
    W_enc, W_dec = (t.detach().requires_grad_() for t in (p.W_enc.t(), p.W_dec))
    b_enc = p.b_enc.to(W_enc.dtype).requires_grad_()
    with torch.enable_grad():
        values, latents, _ = encode(p.x, W_enc, b_enc, k, "topk")
        recon = decode(latents, W_dec, values)
    weights = (W_enc, b_enc, W_dec)
    call = lambda: torch.autograd.grad(recon, weights, d_recon, retain_graph=True)  # noqa: E731
    call()  # what it cannot do, it cannot do here
    latents, order = latents.detach().sort(dim=1)
    return latents, values.detach().gather(1, order), call


def differing(e: Entries, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> dict[str, float]:
    """Assert sparsify's gradients of sampled latents; returns the largest error of each."""
    touched = (e.feature_offsets.diff() > 0).nonzero()[:, 0]
    some = touched[checks.sampled(len(touched), 64)]
    d_W_enc, d_b_enc, _, d_W_dec, _ = ours
    return {
        "d_W_enc": near(theirs[0][some], d_W_enc.t()[some], "sparsify's d_W_enc"),
        "d_b_enc": near(theirs[1][some], d_b_enc[some], "sparsify's d_b_enc", NEAR_BIAS),
        "d_W_dec": near(theirs[2][some], d_W_dec[some], "sparsify's d_W_dec"),
    }


def near(got: Tensor, truth: Tensor, name: str, most: float = NEAR) -> float:
    """Assert a result of theirs; returns its error relative to the largest element."""
    error = float((got.double() - truth.double()).abs().max() / truth.double().abs().max())
    assert error <= most, f"{name} is off by {error:.2e} of its largest element"
    return error


# ---- entries


def drawn(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """`[n, l0]` int64 latents, ascending and distinct in each row.

    Latents are drawn one by one by their rates until `l0` distinct ones are there: more than enough
    at once, of which the first are kept.
    """
    n, k = shape.n, shape.l0
    g = torch.Generator(device).manual_seed(seed + 1)
    total = firing_rates(shape.d_sae, k, shape.firing).cumsum(0).to(device)
    count = 2 * k + 16
    while True:
        at = torch.rand(n, count, generator=g, device=device, dtype=torch.float64) * total[-1]
        latents = torch.searchsorted(total, at, right=True).clamp(max=shape.d_sae - 1)
        ascending, order = latents.sort(dim=1, stable=True)
        new = torch.ones_like(ascending, dtype=torch.bool)
        new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
        first = torch.empty_like(new).scatter_(1, order, new)
        seen = first.cumsum(1)
        if bool((seen[:, -1] >= k).all()):
            return latents[first & (seen <= k)].view(n, k).sort(dim=1).values
        count *= 2


def entries_of_rows(latents: Tensor, values: Tensor, d_sae: int) -> Entries:
    """`[n, k]` ascending latents and their values as entries; a value of 0 is off."""
    n, k = latents.shape
    offsets = k * torch.arange(n + 1, device=latents.device)
    indices, held = latents.flatten().to(torch.int32), values.float().flatten()
    view = ops.overload("by_feature", offsets)(offsets, indices, d_sae)
    rows = torch.arange(n, device=latents.device).repeat_interleave(k)
    return Entries(offsets, indices, held, (held > 0).float(), *view, rows)
