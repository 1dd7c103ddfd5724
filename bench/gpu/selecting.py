"""Part `topk`: encoders that select by rank, exact and screened, beside this machine's matmul."""

from __future__ import annotations

from typing import Any

import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops

from . import checks, dense
from .context import Context, Shape, Skip
from .encoders import AUDITED, device_of, estimate, on_matmul
from .problem import Problem, problem
from .rows import OURS
from .timing import compare, free
from .triton import TRITON, call_of


def topk(ctx: Context) -> None:
    """TopK against linear + ReLU + `torch.topk`, BatchTopK against the matmul; screened, both."""
    for shape in ctx.settings.shapes(("uniform",)):
        kinds = {"topk": _topk, "topk screened": _topk_screened}
        if shape.l0 == ctx.settings.l0s[0]:
            kinds |= {"batchtopk": _batchtopk, "batchtopk screened": _batchtopk_screened}
        for kind, measure in kinds.items():
            ctx.row(
                f"{kind} {shape.name}",
                lambda shape=shape, measure=measure: measure(ctx, shape),
                estimate(ctx, shape, 6),
                shape=shape.json(),
            )
            free(device_of(ctx))


def _topk(ctx: Context, shape: Shape) -> dict[str, Any]:
    device, k = device_of(ctx), shape.l0
    p = problem(shape, device, decoder=False)
    args = (p.x, p.W_enc, p.b_enc)
    op = ops.overload("topk_encode", *args)
    offsets, indices, values, *_ = op(*args, k, False)
    error = checks.selected(p, k, offsets, indices, values)
    del offsets, indices, values
    too_large = dense.fits(shape, device, 2, 1)
    times = compare(
        {
            OURS: lambda: op(*args, k, False),
            "matmul": lambda: p.x @ p.W_enc,
            "torch.topk": too_large or (lambda: dense.topk(p, k)),
            TRITON: call_of("topk_encode", device, *args, k, False),
        },
        device,
        ctx.settings.row_seconds,
    )
    return on_matmul("topk", shape, times, k * shape.n, error)


def _packed(p: Problem) -> gsf.PackedEncoder:
    packed = gsf.pack(p.W_enc, precision="screened")
    if packed.codes is None:
        raise Skip("nothing on this machine would use the codes")
    return packed


def _audited(row: dict[str, Any], audit: gsf.Audit, told: gsf.Explanation) -> dict[str, Any]:
    """The row with what the audit found and what the screened call told."""
    row |= {"audited": audit.entries, "missed": audit.missed, "extra": audit.extra}
    row |= {"recall": audit.recall, "line": f"{row['line']}; {audit}; {told}"}
    return row


def _topk_screened(ctx: Context, shape: Shape) -> dict[str, Any]:
    device, k = device_of(ctx), shape.l0
    p = problem(shape, device, decoder=False)
    packed, args = _packed(p), (p.x, p.W_enc, p.b_enc)
    op = ops.overload("topk_encode", *args)
    acts = gsf.topk_encode(p.x, packed, p.b_enc, k)
    told = gsf.explain()
    audit = gsf.audit(acts, *args, tokens=AUDITED)
    error = checks.selected(p, k, acts.offsets, acts.indices, acts.values)
    del acts
    too_large = dense.fits(shape, device, 2, 1)
    times = compare(
        {
            OURS: lambda: op(*args, k, False, packed.codes),
            "ours, not screened": lambda: op(*args, k, False),
            "matmul": lambda: p.x @ p.W_enc,
            "torch.topk": too_large or (lambda: dense.topk(p, k)),
        },
        device,
        ctx.settings.row_seconds,
    )
    return _audited(on_matmul("topk", shape, times, k * shape.n, error), audit, told)


def _batchtopk(ctx: Context, shape: Shape) -> dict[str, Any]:
    device, k = device_of(ctx), float(shape.l0)
    p = problem(shape, device, decoder=False)
    args = (p.x, p.W_enc, p.b_enc)
    op = ops.overload("batchtopk_encode", *args)
    offsets, indices, values, _, _, threshold, *_ = op(*args, k, None, None, False)
    error = _batch_selected(p, offsets, indices, values, float(threshold))
    guess = float(threshold)
    del offsets, indices, values
    times = compare(
        {
            OURS: lambda: op(*args, k, None, None, False),
            "ours, last threshold as guess": lambda: op(*args, k, guess, None, False),
            "matmul": lambda: p.x @ p.W_enc,
            TRITON: call_of("batchtopk_encode", device, *args, k, None, None, False),
        },
        device,
        ctx.settings.row_seconds,
    )
    return on_matmul("batchtopk", shape, times, int(k * shape.n), error)


def _batchtopk_screened(ctx: Context, shape: Shape) -> dict[str, Any]:
    device, k = device_of(ctx), float(shape.l0)
    p = problem(shape, device, decoder=False)
    packed, args = _packed(p), (p.x, p.W_enc, p.b_enc)
    op = ops.overload("batchtopk_encode", *args)
    acts = gsf.batchtopk_encode(p.x, packed, p.b_enc, k)
    told = gsf.explain()
    audit = gsf.audit(acts, *args, tokens=AUDITED)
    assert acts.threshold is not None
    guess = float(acts.threshold)
    error = _batch_selected(p, acts.offsets, acts.indices, acts.values, guess)
    del acts
    times = compare(
        {
            OURS: lambda: op(*args, k, None, None, False, packed.codes),
            "ours, last threshold as guess": lambda: op(*args, k, guess, None, False, packed.codes),
            "ours, not screened": lambda: op(*args, k, None, None, False),
            "ours, not screened, guess": lambda: op(*args, k, guess, None, False),
            "matmul": lambda: p.x @ p.W_enc,
        },
        device,
        ctx.settings.row_seconds,
    )
    return _audited(on_matmul("batchtopk", shape, times, int(k * shape.n), error), audit, told)


def _batch_selected(
    p: Problem, offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, least: float
) -> float:
    """A batch's selection is a JumpReLU at its implied threshold, up to ties with it."""
    uniform = torch.full_like(p.threshold, least)
    return checks.encoded(
        Problem(p.x, p.W_enc, p.b_enc, uniform, p.W_dec, p.b_dec), offsets, indices, values
    )
