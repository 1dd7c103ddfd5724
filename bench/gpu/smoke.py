"""Part `smoke`: minutes before anything long, whether every op works on this device at all.

Self-tests on whole numbers, run-to-run bits, side streams, two streams, CUDA graphs, and sizes
beyond 2^31 elements, for real.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import doctor, ops

from .context import ROOT, Context
from .encoders import device_of
from .few import portable
from .sanitized import moved_to
from .steps import sparse_step
from .streams import (
    captured_graph,
    flat,
    lossy_graph,
    problem_of,
    same,
    side_stream,
    sizeless_graph,
    two_streams,
)
from .timing import alive, free


def smoke(ctx: Context) -> None:
    device = device_of(ctx)
    for name in ops.TABLE:
        _check(ctx, f"self-test {name}", lambda name=name: _self_test(name, device))
    _check(ctx, "few tokens", lambda: _few_tokens(ctx))
    _check(ctx, "run-to-run bits", lambda: _bits(ctx))
    _check(ctx, "run-to-run bits, whole step", lambda: _step_bits(ctx))
    _check(ctx, "side stream", lambda: side_stream(ctx))
    _check(ctx, "two streams", lambda: two_streams(ctx))
    _check(ctx, "CUDA graph", lambda: captured_graph(ctx))
    _check(ctx, "CUDA graph with a loss", lambda: lossy_graph(ctx))
    _check(ctx, "CUDA graph without a size", lambda: sizeless_graph(ctx))
    _check(ctx, "beyond 2^31 pairs", lambda: _many_pairs(ctx))
    _check(ctx, "beyond 2^31 weights", lambda: _many_weights(ctx))


def _check(ctx: Context, name: str, check: Callable[[], str]) -> None:
    """A row that passes with a word of what was seen, or fails with the assertion."""

    def measure() -> dict[str, Any]:
        line = check()
        alive(device_of(ctx))
        return {"line": line}

    ctx.row(name, measure, 5)
    free(device_of(ctx))


def _self_test(name: str, device: torch.device) -> str:
    told = doctor.self_test(name, device.type)
    assert told == "pass", told
    return f"{ops.implementation(name, device.type)}, equal to the reference on whole numbers"


def _few_tokens(ctx: Context) -> str:
    """1 to 17 tokens of whole numbers: the entries of the reference, with either kernel."""
    device = device_of(ctx)
    g = torch.Generator(device).manual_seed(0)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=g, device=device)  # noqa: E731
    d, d_sae, k = (40, 200, 7) if ctx.settings.quick else (2304, 16_411, 40)
    bias, theta = whole(d_sae).float(), whole(d_sae).float() + (16 if ctx.settings.quick else 150)
    for dtype in (torch.bfloat16, torch.float16):
        x, W = whole(17, d).to(dtype), whole(d_sae, d).to(dtype).t()
        for n in range(1, 18):
            encoder = x[:n], W, bias
            calls = {
                "jumprelu_encode": [
                    (*encoder, theta, 2.0, room, True) for room in (None, n * 2000)
                ],
                "topk_encode": [(*encoder, k, True)],
                "batchtopk_encode": [
                    (*encoder, k - 0.5, None, room, True) for room in (None, n * k)
                ],
            }
            for name, variants in calls.items():
                for args in variants:
                    wanted = list(getattr(getattr(torch.ops, ops.REFERENCE), name)(*args))
                    op = getattr(getattr(torch.ops, ops.NAMESPACE), name)
                    assert same(list(op(*args)), wanted), f"{name}, n={n}, {dtype}"
                    with portable():
                        assert same(list(op(*args)), wanted), f"{name}, n={n}, {dtype}, tiles"
    return "equal to the reference on whole numbers, and so are the tiles"


# ---- the same bits


def _bits(ctx: Context) -> str:
    """Every op of the tests' samples, in each dtype, three times."""
    sys.path.insert(0, str(ROOT / "tests"))
    import samples

    device, calls = device_of(ctx), 0
    dtypes = (torch.float32, torch.bfloat16) if ctx.settings.quick else samples.DTYPES
    for dtype in dtypes:
        found = samples.samples(samples.problem(x_dtype=dtype, w_dtype=dtype))
        for name, variants in found.items():
            for args in variants:
                runs = [_outputs(name, args, device) for _ in range(3)]
                for again in runs[1:]:
                    assert same(runs[0], again), f"{name} {dtype} gives other bits when run again"
                calls += 1
    return f"{calls} calls"


def _outputs(name: str, args: list[Any], device: torch.device) -> list[Tensor]:
    moved = [moved_to(a, str(device)) for a in args]
    result = getattr(torch.ops.gemmascope_fast, name).default(*moved)
    if result is None:  # written in place
        return moved[:1]
    return [result] if isinstance(result, Tensor) else list(result)


def _step_bits(ctx: Context) -> str:
    """A step large enough that its programs run in another order each time."""
    p = problem_of(ctx)
    first = flat(sparse_step(p))
    for _ in range(4):
        assert same(first, flat(sparse_step(p))), "the step gives other bits when run again"
    return f"5 runs, {first[1].shape[0] - 1} tokens"


# ---- beyond 2^31


def _many_pairs(ctx: Context) -> str:
    """n * F > 2^31, entries in the first and last row and column, through every encoder."""
    device, quick = device_of(ctx), ctx.settings.quick
    n, d_sae = (21, 1027) if quick else (2100, 2**20 + 3)
    x = torch.zeros(n, 16, device=device)
    W = torch.zeros(d_sae, 16, device=device)
    x[0, 0] = x[-1, 1] = 1
    W[[5, d_sae - 1], 0] = torch.tensor([2.0, 3.0], device=device)
    W[[7, d_sae - 2], 1] = torch.tensor([4.0, 5.0], device=device)
    zeros = torch.zeros(d_sae, device=device)
    for acts in (
        gsf.jumprelu_encode(x, W.t(), zeros, zeros + 1),
        gsf.batchtopk_encode(x, W.t(), zeros, 4 / n),
    ):
        assert acts.tokens().tolist() == [0, 0, n - 1, n - 1]
        assert acts.indices.tolist() == [5, d_sae - 1, 7, d_sae - 2]
        assert acts.values.tolist() == [2.0, 3.0, 4.0, 5.0]
    top = gsf.topk_encode(x, W.t(), zeros, 2)
    assert top.indices[:2].tolist() == [5, d_sae - 1], "topk, first token"
    assert top.indices[-2:].tolist() == [7, d_sae - 2], "topk, last token"
    return f"{n} x {d_sae} = {n * d_sae / 2**31:.2f} * 2^31"


def _many_weights(ctx: Context) -> str:
    """d * F > 2^31, the last latent used, forward and backward."""
    device, quick = device_of(ctx), ctx.settings.quick
    d, d_sae = (56, 1027) if quick else (2056, 2**20 + 3)
    W = torch.zeros(d_sae, d, dtype=torch.bfloat16, device=device)
    W[d_sae - 1] = 1
    W[11, 3] = 2
    W_dec = W.clone().requires_grad_()
    W_enc = W.t().requires_grad_()
    zeros = torch.zeros(d_sae, device=device)
    x = torch.ones(2, d, device=device)
    acts = gsf.jumprelu_encode(x, W_enc, zeros, zeros + 1)
    assert acts.indices.tolist() == [11, d_sae - 1] * 2
    assert acts.values.tolist() == [2.0, float(d)] * 2
    recon = gsf.decode(acts, W_dec)
    expected = torch.full((d,), float(d), device=device)
    expected[3] += 4
    assert torch.equal(recon, expected.bfloat16().expand(2, d)), "reconstruction"
    recon[0].sum().backward()
    assert W_dec.grad is not None and W_enc.grad is not None
    last = torch.tensor([2.0, float(d)], device=device).bfloat16()
    assert torch.equal(W_dec.grad[[11, d_sae - 1]], last[:, None].expand(2, d)), "d_W_dec"
    ends = torch.tensor([2.0, float(d)], device=device).bfloat16()
    assert torch.equal(W_enc.grad.t()[[11, d_sae - 1], 0], ends), "d_W_enc"
    assert not W_dec.grad[12].any() and not W_enc.grad[:, 12].any(), "untouched latents"
    return f"{d} x {d_sae} = {d * d_sae / 2**31:.2f} * 2^31"
