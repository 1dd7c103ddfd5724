"""Parts `ceilings`, `encode` and `screened`: what stands on this machine's matmul."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops

from . import checks, chunked, dense
from .context import Context, Shape, Skip
from .problem import problem
from .rows import OURS, compose, encode_flops
from .timing import compare, copy_rate, free
from .triton import TRITON, call_of

AUDITED = 2048
"""Tokens whose entries are compared with float64 sums of all products: 131,072 entries at L0 64."""


def device_of(ctx: Context) -> torch.device:
    return torch.device(ctx.settings.device)


def copy_bytes(ctx: Context) -> int:
    return (1 << 20) if ctx.settings.quick else (2 << 30)


def estimate(ctx: Context, shape: Shape, products: float) -> float:
    """Seconds of a row: its dense products at a pessimistic rate, set-up, compilation."""
    if ctx.settings.quick:
        return 0.5
    rate = 300e12 if ctx.settings.device == "cuda" else 50e9
    once = products * encode_flops(shape) / rate
    return 6 * once + 2 * ctx.settings.row_seconds + 8


# ---- ceilings


def ceilings(ctx: Context) -> None:
    """Rates in this process: copies, gathers of random rows, bfloat16 products of each shape."""
    device = device_of(ctx)
    ctx.row("copy", lambda: _copy(ctx))
    ctx.row("random rows", lambda: _gather(ctx))
    for d_sae in ctx.settings.latents:
        shape = Shape(ctx.settings.n, ctx.settings.d, d_sae, 0)
        ctx.row(f"matmul F={d_sae}", lambda shape=shape: _matmul(ctx, shape))
        free(device)


def _copy(ctx: Context) -> dict[str, Any]:
    rate = copy_rate(device_of(ctx), copy_bytes(ctx))
    return {"gb_per_s": rate / 1e9, "line": f"{rate / 1e9:.0f} GB/s read plus written"}


def _gather(ctx: Context) -> dict[str, Any]:
    """`index_select` of random rows out of a matrix far larger than the cache."""
    s, device = ctx.settings, device_of(ctx)
    table = torch.empty(s.latents[-1], s.d, dtype=torch.bfloat16, device=device).normal_()
    rows = torch.randint(s.latents[-1], (8 * s.n,), device=device)
    out = torch.empty(8 * s.n, s.d, dtype=torch.bfloat16, device=device)
    times = compare(
        {"index_select": lambda: torch.index_select(table, 0, rows, out=out)}, device, s.row_seconds
    )
    seconds = times["index_select"]["median_s"]
    rate = 2 * out.numel() * out.element_size() / seconds / 1e9
    return {"gb_per_s": rate, "times": times, "line": f"{rate:.0f} GB/s read plus written"}


def _matmul(ctx: Context, shape: Shape) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(_at_least_one(shape), device, decoder=False)
    out = torch.empty(shape.n, shape.d_sae, dtype=p.x.dtype, device=device)
    times = compare(
        {"matmul": lambda: torch.mm(p.x, p.W_enc, out=out)}, device, ctx.settings.row_seconds
    )
    if "unavailable" in times["matmul"]:
        raise Skip(times["matmul"]["unavailable"])
    rate = encode_flops(shape) / times["matmul"]["median_s"] / 1e12
    told = f"{1e3 * times['matmul']['median_s']:.3f} ms, {rate:.1f} TFLOP/s"
    return {"shape": shape.json(), "tflops": rate, "times": times, "line": told}


def _at_least_one(shape: Shape) -> Shape:
    return Shape(shape.n, shape.d, shape.d_sae, 1)


# ---- JumpReLU encode


def encode(ctx: Context) -> None:
    """`jumprelu_encode` against the plain product, dense JumpReLU, eager and compiled."""
    compiled = dense.compiled(ctx.settings, dense.encode)
    for shape in ctx.settings.shapes():
        seconds = estimate(ctx, shape, 4) + (0 if ctx.settings.quick or ctx.settings.brief else 20)
        ctx.row(
            shape.name, lambda shape=shape: _encode(ctx, shape, compiled), seconds,
            shape=shape.json(),
        )  # fmt: skip
        free(device_of(ctx))


def _encode(ctx: Context, shape: Shape, compiled: Any) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device, decoder=False)
    args = (p.x, p.W_enc, p.b_enc, p.threshold)
    op = ops.overload("jumprelu_encode", *args)
    offsets, indices, values, *_ = op(*args, 0.0, None, False)
    error = checks.encoded(p, offsets, indices, values)
    nnz = indices.shape[0]
    del offsets, indices, values
    capacity = nnz + nnz // 8 + 64
    batches = itertools.cycle((p.x, torch.randn_like(p.x)))
    too_large = dense.fits(shape, device, 2, 1)
    times = compare(
        {
            OURS: lambda: op(*args, 0.0, None, False),
            "ours, fixed capacity": lambda: op(*args, 0.0, capacity, False),
            "ours, batches in turn": lambda: op(next(batches), *args[1:], 0.0, None, False),
            "matmul": lambda: p.x @ p.W_enc,
            "dense eager": too_large or (lambda: dense.encode(p)),
            "torch.compile": dense.compiles(ctx.settings, too_large) or (lambda: compiled(p)),
            **chunked.contenders(p, nnz),
            TRITON: call_of("jumprelu_encode", device, *args, 0.0, None, False),
        },
        device,
        ctx.settings.row_seconds,
    )
    return on_matmul("encode", shape, times, nnz, error)


def on_matmul(
    part: str, shape: Shape, times: dict[str, dict[str, Any]], nnz: int, error: float, **more: Any
) -> dict[str, Any]:
    """A row whose floor is the plain matmul."""
    return compose(
        *(part, shape, times),
        floor_s=times["matmul"].get("median_s"),
        floor="the plain matmul",
        flops=encode_flops(shape),
        nnz=nnz,
        l0=nnz / shape.n,
        error=error,
        **more,
    )


# ---- screened JumpReLU encode


def screened(ctx: Context) -> None:
    """`jumprelu_encode` on weights of `pack(precision="screened")`, and an audit of its entries."""
    for shape in ctx.settings.shapes(("uniform",)):
        seconds = estimate(ctx, shape, 3) + (0 if ctx.settings.quick else 15)
        ctx.row(
            shape.name, lambda shape=shape: _screened(ctx, shape), seconds, shape=shape.json()
        )  # fmt: skip
        free(device_of(ctx))


def _screened(ctx: Context, shape: Shape) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device, decoder=False)
    packed = gsf.pack(p.W_enc, precision="screened")
    if packed.codes is None:
        raise Skip("nothing on this machine would use the codes")
    args = (p.x, p.W_enc, p.b_enc, p.threshold)
    op = ops.overload("jumprelu_encode", *args)
    acts = gsf.jumprelu_encode(p.x, packed, p.b_enc, p.threshold)
    told = gsf.explain()
    audit = gsf.audit(acts, *args, tokens=AUDITED)
    nnz, fired = acts.nnz, acts.fired().long()
    error = checks.encoded(p, acts.offsets, acts.indices, acts.values)
    del acts

    def requantise() -> None:
        torch.ops.gemmascope_fast.repack_encoder_(packed.codes, p.W_enc, fired, 1, 0)

    times = compare(
        {
            OURS: lambda: op(*args, 0.0, None, False, packed.codes),
            "ours, not screened": lambda: op(*args, 0.0, None, False),
            "matmul": lambda: p.x @ p.W_enc,
            "pack": lambda: gsf.pack(p.W_enc, precision="screened"),
            "requantise what fired": "a CPU does not" if device.type == "cpu" else requantise,
        },
        device,
        ctx.settings.row_seconds,
    )
    audited = {"audited": audit.entries, "missed": audit.missed, "extra": audit.extra}
    row = on_matmul("screened", shape, times, nnz, error, recall=audit.recall, **audited)
    row["line"] = f"{row['line']}; {audit}; {told}"
    return row
