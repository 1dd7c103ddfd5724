"""Part `smoke`: minutes before anything long, whether every op works on this device at all.

Self-tests on whole numbers, run-to-run bits, side streams, two streams, CUDA graphs, and sizes
beyond 2^31 elements, for real.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import doctor, ops

from .context import ROOT, Context, Shape, Skip
from .encoders import device_of
from .few import portable
from .passes import sparse_step
from .problem import Problem, problem
from .sanitized import moved_to
from .timing import alive, free


def smoke(ctx: Context) -> None:
    device = device_of(ctx)
    for name in ops.TABLE:
        _check(ctx, f"self-test {name}", lambda name=name: _self_test(name, device))
    _check(ctx, "few tokens", lambda: _few_tokens(ctx))
    _check(ctx, "run-to-run bits", lambda: _bits(ctx))
    _check(ctx, "run-to-run bits, whole step", lambda: _step_bits(ctx))
    _check(ctx, "side stream", lambda: _side_stream(ctx))
    _check(ctx, "two streams", lambda: _two_streams(ctx))
    _check(ctx, "CUDA graph", lambda: _graph(ctx))
    _check(ctx, "CUDA graph with a loss", lambda: _lossy_graph(ctx))
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


def _cuda_only(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("streams and graphs are a GPU's")


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
                    assert _same(list(op(*args)), wanted), f"{name}, n={n}, {dtype}"
                    with portable():
                        assert _same(list(op(*args)), wanted), f"{name}, n={n}, {dtype}, tiles"
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
                    assert _same(runs[0], again), f"{name} {dtype} gives other bits when run again"
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
    p = _problem(ctx)
    first = _flat(sparse_step(p))
    for _ in range(4):
        assert _same(first, _flat(sparse_step(p))), "the step gives other bits when run again"
    return f"5 runs, {first[1].shape[0] - 1} tokens"


def _flat(result: tuple[Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [result[0], *result[1], *result[2]]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal to the bit; NaN is equal to NaN."""
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in pairs)


def _problem(ctx: Context, seed: int = 0) -> Problem:
    s = ctx.settings
    n, d, d_sae = (s.n, s.d, s.latents[0]) if s.quick else (2048, 640, 2**14)
    return problem(Shape(n, d, d_sae, s.l0s[0], "log-normal"), device_of(ctx), seed=seed)


# ---- streams and graphs


def _side_stream(ctx: Context) -> str:
    """Inputs that a slow side stream is still writing: an op on another stream reads garbage."""
    device = device_of(ctx)
    _cuda_only(device)
    p = _problem(ctx)
    expected = _flat(sparse_step(p))
    late = Problem(torch.zeros_like(p.x), p.W_enc, p.b_enc, p.threshold, p.W_dec, p.b_dec)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.x.copy_(p.x)
        found = _flat(sparse_step(late))
    stream.synchronize()
    assert _same(expected, found), "an op did not run on the current stream"
    return "equal to the default stream"


def _two_streams(ctx: Context) -> str:
    """Two steps at once, a thread each, share neither a workspace nor where sizes are read back."""
    device = device_of(ctx)
    _cuda_only(device)
    problems = [_problem(ctx, seed) for seed in (0, 1)]
    expected = [_flat(sparse_step(p)) for p in problems]
    streams = [torch.cuda.Stream(device) for _ in problems]
    torch.cuda.synchronize(device)

    def step(stream: torch.cuda.Stream, p: Problem) -> list[Tensor]:
        with torch.cuda.stream(stream):
            return _flat(sparse_step(p))

    with ThreadPoolExecutor(2) as pool:
        for turn in range(10):
            found = list(pool.map(step, streams, problems))
            torch.cuda.synchronize(device)
            for mine, theirs in zip(found, expected, strict=True):
                assert _same(mine, theirs), f"turn {turn}: two streams disturb each other"
    return "10 turns"


def _graph(ctx: Context) -> str:
    """Encode with a fixed capacity, decode, TopK of few tokens: captured once, on new tokens."""
    device = device_of(ctx)
    _cuda_only(device)
    p = _problem(ctx)
    capacity = 2 * ctx.settings.l0s[0] * p.x.shape[0]

    def forward() -> tuple[Tensor, ...]:
        acts = gsf.jumprelu_encode(p.x, p.W_enc, p.b_enc, p.threshold, max_nnz=capacity)
        assert acts.needed is not None
        few = gsf.topk_encode(p.x[:16], p.W_enc, p.b_enc, ctx.settings.l0s[0])
        found = acts.offsets, acts.values, acts.needed, gsf.decode(acts, p.W_dec, p.b_dec)
        return *found, few.indices, few.values

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            forward()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = forward()
    for seed in range(3):
        p.x.copy_(torch.randn(p.x.shape, device=device, generator=_seeded(device, seed)))
        graph.replay()
        with torch.no_grad():
            expected = forward()
        assert int(expected[2]) <= capacity, "the capacity is meant to suffice"
        assert _same(list(captured), list(expected)), f"replay {seed} differs from the eager call"
    return "3 replays equal to eager calls"


def _lossy_graph(ctx: Context) -> str:
    """Latents that rise overflow a chunk: eager calls scan again, a graph says so."""
    device = device_of(ctx)
    _cuda_only(device)
    n, d_sae, k = 32, 65_536, 4
    x = torch.ones(n, 16, device=device)
    W = torch.arange(d_sae, device=device).float()[:, None].expand(-1, 16).contiguous()
    bias = torch.zeros(d_sae, device=device)
    with torch.no_grad():
        acts = gsf.batchtopk_encode(x, W.t(), bias, k, max_nnz=k * n)
        assert acts.indices.tolist() == [*range(d_sae - k, d_sae)] * n
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gsf.batchtopk_encode(x, W.t(), bias, k, max_nnz=k * n)
    graph.replay()
    assert captured.needed is not None
    assert bool(captured.values.isnan().all()) and int(captured.needed) > k * n
    return "all values NaN, needed says so"


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(100 + seed)


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
