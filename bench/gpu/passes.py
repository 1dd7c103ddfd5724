"""Parts `decode`, `backward` and `step`: what stands on memory bandwidth, and the whole of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import ops

from . import checks, dense
from .context import Context, Shape
from .encoders import copy_bytes, device_of, estimate
from .problem import (
    BANDWIDTH,
    ENTRY_BANDWIDTH,
    Entries,
    Problem,
    dense_acts,
    dense_pre,
    entries,
    problem,
)
from .rows import DENSE_ADAM, OURS, OURS_ADAM, backward_bytes, compose, decode_bytes, encode_flops
from .splits import UNSPLIT, unsplit
from .targets import OURS_CAPPED, OURS_SCREENED
from .timing import Call, compare, copy_rate, free, unavailable
from .triton import TRITON, call_of


def _random_gradient(p: Problem) -> Tensor:
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
    acts = _or_reason(dense.fits(shape, device, 1, 1), lambda: dense_acts(e, shape, p.W_dec.dtype))
    times = compare(
        {
            OURS: lambda: call(None, None),
            "ours, with the feature-major view": lambda: call(*e.view),
            "dense eager": acts if isinstance(acts, str) else (lambda: dense.decode(p, acts)),
            "embedding_bag": _or_reason("", lambda: dense.bag(p, e)),
            "torch.sparse": _or_reason("", lambda: dense.csr(p, e, shape)),
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
    d_recon = _random_gradient(p)
    ours = sparse_backward(p, e, d_recon)
    error = checks.differentiated(p, e, d_recon, ours(), ENTRY_BANDWIDTH)
    reason = dense.fits(shape, device, 4, 4)
    pre = _or_reason(reason, lambda: dense_pre(e, shape, p.threshold, p.x.dtype))
    missing = pre if isinstance(pre, str) else None
    times = compare(
        {
            OURS: ours,
            UNSPLIT: unsplit(device, ours),
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
        copy_gb_per_s=rate / 1e9,
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


def composed_backward(p: Problem, e: Entries, d_recon: Tensor) -> Call:
    """The same through `decode_backward` and `encode_backward`."""
    first, second = (ops.overload(f"{side}_backward", p.x) for side in ("decode", "encode"))

    def call() -> tuple[Tensor, ...]:
        d_values, d_W_dec, d_b_dec = first(d_recon, *e.csr, p.W_dec, *e.view, True, True, True)
        inputs = (d_values, None, p.x, p.W_enc, p.threshold, ENTRY_BANDWIDTH)
        _, *encoder = second(*inputs, *e.csr, e.gate, *e.view, False, True, True, True)
        return (*encoder, d_W_dec, d_b_dec)

    return call


# ---- step

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
    contenders[OURS_SCREENED] = _or_reason("", lambda: screened_step(p))
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
    optimizer = gsf.optim.Adam(sae, lr=0.0, moments="8bit", fused=True)

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


def _or_reason(reason: str, make: Any) -> Any:
    """What `make` returns, or why it cannot be had: `reason`, or what it raised."""
    if reason:
        return reason
    try:
        return make()
    except Exception as error:
        return unavailable(error)
