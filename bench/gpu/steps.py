"""Part `step`: forward and backward of a training step, and with its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import ops

from . import checks, dense
from .context import Context, Shape
from .encoders import copy_bytes, device_of, estimate
from .problem import BANDWIDTH, Entries, Problem, problem
from .rows import DENSE_ADAM, OURS, OURS_ADAM, backward_bytes, compose, decode_bytes, encode_flops
from .targets import OURS_CAPPED, OURS_SCREENED
from .timing import Call, compare, copy_rate, free, or_reason

LOSS_LATENTS = 2**16
"""Largest dictionary that `SAE.loss` is timed with."""


def step(ctx: Context) -> None:
    """Forward and backward of the mean squared error, and with Adam, against the dense step."""
    rate = copy_rate(device_of(ctx), copy_bytes(ctx))
    compiled = dense.compiled(ctx.settings, dense.step)
    for shape in ctx.settings.shapes():
        if shape.l0 != ctx.settings.l0s[0]:
            continue
        seconds = estimate(ctx, shape, 12) + (0 if ctx.settings.quick or ctx.settings.brief else 30)
        ctx.row(
            shape.name, lambda shape=shape: _step(ctx, shape, rate, compiled), seconds,
            shape=shape.json(),
        )  # fmt: skip
        free(device_of(ctx))


def _step(ctx: Context, shape: Shape, rate: float, compiled: Any) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device)
    recon, found, grads = sparse_step(p)
    e = entries_of(found)
    error = checks.encoded(p, *e.csr, e.gate)
    checks.decoded(p, e, recon)
    checks.differentiated(p, e, (recon - p.x) * (2 / shape.n), grads)
    traffic = decode_bytes(shape, e.nnz, e.touched)
    traffic = {k: v + backward_bytes(shape, e.nnz, e.touched)[k] for k, v in traffic.items()}
    nnz, touched = e.nnz, e.touched
    del recon, found, e, grads
    too_large = dense.fits(shape, device, 4, 4)
    contenders: dict[str, Call | str] = {
        OURS: lambda: sparse_step(p),
        "matmul": lambda: p.x @ p.W_enc,
        "dense eager": too_large or (lambda: dense.step(p)),
        "torch.compile": dense.compiles(ctx.settings, too_large) or (lambda: compiled(p)),
    }
    if shape.d_sae <= LOSS_LATENTS:
        contenders["ours, SAE.loss"] = module_step(p)
    contenders[OURS_ADAM] = adam_step(module_of(p), p.x)
    contenders[OURS_CAPPED] = adam_step(module_of(p), p.x, nnz + nnz // 8)
    contenders[OURS_SCREENED] = or_reason("", lambda: screened_step(p))
    contenders[DENSE_ADAM] = dense.fits(shape, device, 4, 8) or dense.adam_step(p)
    times = compare(contenders, device, ctx.settings.row_seconds)
    product = times["matmul"].get("median_s")
    return compose(
        *("step", shape, times),
        floor_s=None if product is None else product + traffic["gathered"] / rate,
        floor="the matmul and a copy of the gathered bytes",
        flops=encode_flops(shape),
        **{"nnz": nnz, "touched": touched, "l0": nnz / shape.n, "error": error},
        copy_gb_per_s=rate / 1e9,
    )


def sparse_step(p: Problem, sparsity: float = 0.0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Reconstruction, outputs of the encoder, and the five gradients, through three ops.

    The loss is the mean over tokens of the squared error, and of `sparsity` times L0.
    """
    args, n = (p.x, p.W_enc, p.b_enc, p.threshold), p.x.shape[0]
    found = list(ops.overload("jumprelu_encode", *args)(*args, BANDWIDTH, None, True))
    offsets, indices, values, gate, _, *view = found
    entered = (offsets, indices, values)
    recon = ops.overload("decode", p.W_dec)(*entered, p.W_dec, p.b_dec, *view, p.W_dec.dtype)
    d_recon = (recon - p.x) * (2 / n)
    d_gate = torch.full_like(gate, sparsity / n) if sparsity else None
    inputs = (p.x, p.W_enc, p.threshold, BANDWIDTH, p.W_dec, d_recon[None], [p.W_dec.shape[0]])
    op = ops.overload("sae_backward", p.x)
    _, *grads = op(*inputs, *entered, gate, None, d_gate, *view, False)
    return recon, found, grads


def entries_of(found: list[Tensor]) -> Entries:
    """An encoder's outputs with the token of each entry."""
    offsets, indices, values, gate, _, *view = found
    tokens = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    rows = torch.repeat_interleave(tokens, offsets.diff(), output_size=indices.shape[0])
    return Entries(offsets, indices, values, gate, *view, rows)


def module_of(p: Problem) -> gsf.SAE:
    """A module whose parameters are the tensors of `p`, under versions of its own."""
    d_sae, d = p.W_dec.shape
    sae = gsf.SAE(8, 8, gsf.JumpReLU(BANDWIDTH), device=p.x.device, dtype=p.x.dtype)
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        setattr(sae, name, torch.nn.Parameter(getattr(p, name).data))
    assert (sae.d_in, sae.d_sae) == (d, d_sae)
    return sae


def adam_step(sae: gsf.SAE, x: Tensor, max_nnz: int | None = None) -> Call:
    """The same with the update: `gsf.optim.Adam(fused=True)`, 8-bit second moments.

    With `max_nnz` nothing waits for the device, so that Python is ahead of it. lr = 0 is all the
    work of a step, and leaves the weights to the other contenders as they are.
    """
    return stepping(sae, x, gsf.optim.Adam(sae, lr=0.0, moments="8bit", fused=True), max_nnz)


def stepping(sae: gsf.SAE, x: Tensor, optimizer: gsf.optim.Adam, max_nnz: int | None) -> Call:
    """Forward, backward and the step of an optimizer."""

    def call() -> Tensor:
        optimizer.zero_grad()
        loss = (sae.decode(sae.encode(x, max_nnz=max_nnz)) - x).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def screened_step(p: Problem) -> Call | str:
    """`adam_step` on int8 codes that follow the weights, or why there are none.

    Its W_enc is a copy: a step of torch's Adam on the same memory, another contender's, would make
    all codes old.
    """
    sae = module_of(p).screen()
    sae.W_enc = torch.nn.Parameter(p.W_enc.clone())
    call = adam_step(sae, p.x)
    call()
    if gsf.explain().target != "cuda sm_90a":
        return "nothing on this machine would use the codes"
    return call if gsf.explain().path == "screened" else gsf.explain().reason


def module_step(p: Problem) -> Call:
    """The same through `SAE.loss` and autograd, which accumulate gradients block by block."""
    sae = module_of(p)

    def call() -> Tensor:
        sae.zero_grad(set_to_none=True)
        loss, _ = sae.loss(p.x)
        loss.backward()
        return loss.detach()

    return call
