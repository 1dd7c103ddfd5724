"""Parts `few` and `handover`: encoders of 1 and 16 tokens, and dense products behind compiled ops.

Neither kernel of few tokens nor the choice of a dense product stands on the matrix units: the first
is held to a read of W_enc, the second to the pass that it replaces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gemmascope_fast import ops, triton_launchers

from . import checks
from .context import Context, Shape
from .encoders import copy_bytes, device_of, estimate
from .passes import ENTRY_BANDWIDTH
from .problem import Problem, entries, problem
from .rows import OURS, compose, encode_flops
from .timing import compare, copy_rate, free
from .triton import TRITON, call_of

TOKENS = (1, 16)
TILES = "ours, tiles of 32 tokens"
PASSES = "ours, passes"
CHOICE = "GEMMASCOPE_FAST_CUDA_ENCODE"
DENSE = {1024: (64, 96, 192), 4096: (192, 256, 512), 16384: (512, 768, 1536)}
"""Mean active latents around the numbers from which kernels/dense.py expects products to pay."""


# ---- few tokens


def few(ctx: Context) -> None:
    """`jumprelu_encode`, with and without `max_nnz`, and `topk_encode` of 1 and 16 tokens."""
    rate = copy_rate(device_of(ctx), copy_bytes(ctx))
    for whole in ctx.settings.shapes(("uniform",)):
        if whole.l0 != ctx.settings.l0s[0]:
            continue
        for n in TOKENS:
            shape = replace(whole, n=n)
            measure = lambda shape=shape: _few(ctx, shape, rate)  # noqa: E731
            ctx.row(f"n={n} {shape.name}", measure, estimate(ctx, shape, 8), shape=shape.json())
            select = lambda shape=shape: _few_topk(ctx, shape, rate)  # noqa: E731
            ctx.row(f"topk n={n} {shape.name}", select, estimate(ctx, shape, 8), shape=shape.json())
            free(device_of(ctx))


def _few(ctx: Context, shape: Shape, rate: float) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device, decoder=False)
    args = (p.x, p.W_enc, p.b_enc, p.threshold)
    op = ops.overload("jumprelu_encode", *args)
    found = op(*args, 0.0, None, False)
    error = checks.encoded(p, *found[:3])
    capacity = 2 * found[1].shape[0] + 64
    fixed = lambda: op(*args, 0.0, capacity, False)  # noqa: E731
    times = compare(
        {
            OURS: fixed,
            "ours, exact size": lambda: op(*args, 0.0, None, False),
            TILES: _tiled(device, fixed),
            "matmul": lambda: p.x @ p.W_enc,
            TRITON: call_of("jumprelu_encode", device, *args, 0.0, capacity, False),
        },
        device,
        ctx.settings.row_seconds,
    )
    return _on_weights(shape, p, times, rate, error)


def _few_topk(ctx: Context, shape: Shape, rate: float) -> dict[str, Any]:
    device, k = device_of(ctx), shape.l0
    p = problem(shape, device, decoder=False)
    args = (p.x, p.W_enc, p.b_enc)
    op = ops.overload("topk_encode", *args)
    error = checks.selected(p, k, *op(*args, k, False)[:3])
    times = compare(
        {
            OURS: lambda: op(*args, k, False),
            TILES: _tiled(device, lambda: op(*args, k, False)),
            "matmul": lambda: p.x @ p.W_enc,
            "linear + ReLU + torch.topk": lambda: (p.x @ p.W_enc).relu().topk(k),
            TRITON: call_of("topk_encode", device, *args, k, False),
        },
        device,
        ctx.settings.row_seconds,
    )
    return _on_weights(shape, p, times, rate, error)


def _on_weights(
    shape: Shape, p: Problem, times: dict[str, dict[str, Any]], rate: float, error: float
) -> dict[str, Any]:
    """The row, held to a read of W_enc at the rate of copies."""
    return compose(
        *("few", shape, times),
        floor_s=p.W_enc.numel() * p.W_enc.element_size() / rate,
        floor="W_enc at the rate of copies",
        flops=encode_flops(shape),
        error=error,
    )


def _tiled(device: torch.device, call: Callable[[], object]) -> Callable[[], object] | str:
    """The same op on the kernels of many tokens."""
    if device.type != "cuda" or ops.implementation("jumprelu_encode", "cuda") != "native":
        return "kernels of a GPU"

    def run() -> object:
        with portable():
            return call()

    return run


@contextmanager
def portable() -> Iterator[None]:
    """Encoders without the kernels of few tokens and of Hopper."""
    os.environ[CHOICE] = "portable"
    try:
        yield
    finally:
        del os.environ[CHOICE]


# ---- dense products


def handover(ctx: Context) -> None:
    """`decode` and `sae_backward` as they choose, and as passes: is the choice right?"""
    few_latents = {512: (8,)} if ctx.settings.quick else DENSE
    for d_sae, l0s in few_latents.items():
        for l0 in l0s:
            shape = Shape(ctx.settings.n, ctx.settings.d, d_sae, l0)
            measure = lambda shape=shape: _handover(ctx, shape)  # noqa: E731
            ctx.row(shape.name, measure, estimate(ctx, shape, 8), shape=shape.json())
            free(device_of(ctx))


def _handover(ctx: Context, shape: Shape) -> dict[str, Any]:
    device = device_of(ctx)
    p = problem(shape, device)
    e = entries(shape, p.threshold)
    d_recon = torch.randn(p.x.shape, device=device).to(p.x.dtype) / shape.n
    decode, backward = (ops.overload(name, p.W_dec) for name in ("decode", "sae_backward"))
    some = (p.x, p.W_enc, p.threshold, ENTRY_BANDWIDTH, p.W_dec, d_recon[None], [shape.d_sae])
    args = (*some, *e.csr, e.gate, None, None, *e.view, False)

    def both() -> list[torch.Tensor]:
        recon = decode(*e.csr, p.W_dec, p.b_dec, *e.view, p.W_dec.dtype)
        return [recon, *backward(*args)]

    recon, _, *grads = both()
    error = max(
        checks.decoded(p, e, recon),
        checks.differentiated(p, e, d_recon, grads, ENTRY_BANDWIDTH),
    )
    times = compare({OURS: both, PASSES: _as_passes(both)}, device, 2 * ctx.settings.row_seconds)
    return compose(*("handover", shape, times), floor_s=None, floor="", error=error, nnz=e.nnz)


def _as_passes(call: Callable[[], object]) -> Callable[[], object] | str:
    """The same without products; a reason where none could be chosen."""
    if not torch._C._dispatch_has_kernel(f"{ops.TRITON}::set_rates"):
        return "the library is built without CUDA"
    set_rates = torch.ops.gemmascope_fast_triton.set_rates

    def run() -> object:
        set_rates([])
        try:
            return call()
        finally:
            set_rates(triton_launchers.dense_rates())

    return run
