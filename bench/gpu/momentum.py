"""Part `momentum`: training steps with beta1 = 0.9, where rows without a gradient move too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf

from . import checks, dense
from .context import Context, Shape
from .encoders import device_of, estimate
from .problem import Problem, firing_rates, problem
from .rows import OURS, compose, encode_flops
from .steps import entries_of, module_of, sparse_step, stepping
from .targets import DENSE_ADAM, MOMENTUM_CAPPED
from .timing import Call, compare, free, or_reason

BETAS = (0.9, 0.999)
LATENTS = 2**18
"""Largest dictionary: a first moment is 8 bytes of float32 per latent and column of x, and each of
three contenders has its own."""
STEPS = 1000
"""Age of the optimizers' states: every latent has fired, or the rows that never did cost nothing
though they will."""


def momentum(ctx: Context) -> None:
    """Forward, backward and update of every row, against the dense step of torch's fused Adam."""
    for shape in ctx.settings.shapes():
        if shape.l0 != ctx.settings.l0s[0] or shape.d_sae > LATENTS:
            continue
        ctx.row(
            shape.name, lambda shape=shape: _momentum(ctx, shape), estimate(ctx, shape, 20),
            shape=shape.json(),
        )  # fmt: skip
        free(device_of(ctx))


def _momentum(ctx: Context, shape: Shape) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device)
    _, found, grads = sparse_step(p)
    e = entries_of(found)
    error = checks.encoded(p, *e.csr, e.gate)
    nnz, touched = e.nnz, (e.feature_offsets.diff() > 0).nonzero()[:, 0]
    del found, e
    exact, held = aged(p, shape, "exact")
    exact()
    error = max(error, moments(held, grads, touched))
    del grads, held
    contenders: dict[str, Call | str] = {OURS: exact}
    contenders[MOMENTUM_CAPPED] = or_reason("", lambda: aged(p, shape, "exact", nnz + nnz // 8)[0])
    contenders['ours, rows="live"'] = or_reason("", lambda: aged(p, shape, "live")[0])
    contenders["matmul"] = lambda: p.x @ p.W_enc
    too_large = dense.fits(shape, device, 4, 8)
    contenders[DENSE_ADAM] = or_reason(too_large, lambda: dense.adam_step(p, BETAS[0]))
    times = compare(contenders, device, ctx.settings.row_seconds)
    return compose(
        *("momentum", shape, times),
        floor_s=None,
        floor="",
        flops=encode_flops(shape),
        **{"nnz": nnz, "touched": len(touched), "l0": nnz / shape.n, "error": error},
        update='gsf.optim.Adam(fused=True, rows="exact"), beta1 = 0.9, 8-bit second moments',
    )


def aged(
    p: Problem, shape: Shape, rows: str, max_nnz: int | None = None
) -> tuple[Call, gsf.optim.Adam]:
    """A step whose optimizer is told that it is `STEPS` steps old, and that optimizer.

    Latents fired last when their rates have it, at the latest in the first step. lr = 0 as in
    `steps.adam_step`.
    """
    sae = module_of(p)
    adam = gsf.optim.Adam(sae, lr=0.0, betas=BETAS, rows=rows, moments="8bit", fused=True)
    adam.prepare()
    last = last_fired(shape, p.x.device)
    for state in adam.state.values():
        state["step"] = STEPS
        wide = state["touched_at"].shape[0] == shape.d_sae
        state["touched_at"].copy_(last if wide else torch.full_like(last[:1], STEPS))
    return stepping(sae, p.x, adam, max_nnz), adam


def last_fired(shape: Shape, device: torch.device) -> Tensor:
    """`[d_sae]` step, from 1 to `STEPS`, in which each latent fired last, drawn by its rate."""
    rates = firing_rates(shape.d_sae, shape.l0, shape.firing)
    generator = torch.Generator().manual_seed(2)
    wait = torch.empty_like(rates).uniform_(generator=generator).log() / torch.log1p(-rates)
    steps = (wait / shape.n).floor().clamp(max=STEPS - 1)
    return (STEPS - steps).long().to(device)


def moments(adam: gsf.optim.Adam, grads: list[Tensor], touched: Tensor) -> float:
    """Assert first moments after the first step: (1 - beta1) g; returns the largest error."""
    d_W_enc, _, _, d_W_dec, _ = grads
    first = {tuple(p.shape): s["exp_avg"] for p, s in adam.state.items() if p.dim() == 2}
    worst = 0.0
    for name, grad, turn in (("d_W_enc", d_W_enc, True), ("d_W_dec", d_W_dec, False)):
        moment = first[tuple(grad.shape)]
        here, there = (moment.t(), grad.t()) if turn else (moment, grad)
        for at in checks.sampled(len(touched), 6):
            j = touched[at]
            truth = (1 - BETAS[0]) * there[j].double()
            worst = max(worst, checks.close(here[j], truth, f"first moment of {name}"))
    return worst
