"""Checks of part `smoke` that a single stream cannot fail: other streams, threads, CUDA graphs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import gemmascope_fast as gsf

from .context import Context, Shape, Skip
from .encoders import device_of
from .problem import Problem, problem
from .steps import sparse_step


def problem_of(ctx: Context, seed: int = 0) -> Problem:
    s = ctx.settings
    n, d, d_sae = (s.n, s.d, s.latents[0]) if s.quick else (2048, 640, 2**14)
    return problem(Shape(n, d, d_sae, s.l0s[0], "log-normal"), device_of(ctx), seed=seed)


def flat(result: tuple[Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [result[0], *result[1], *result[2]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal to the bit; NaN is equal to NaN."""
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in pairs)


def _cuda_only(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("streams and graphs are a GPU's")


# ---- streams and graphs


def side_stream(ctx: Context) -> str:
    """Inputs that a slow side stream is still writing: an op on another stream reads garbage."""
    device = device_of(ctx)
    _cuda_only(device)
    p = problem_of(ctx)
    expected = flat(sparse_step(p))
    late = Problem(torch.zeros_like(p.x), p.W_enc, p.b_enc, p.threshold, p.W_dec, p.b_dec)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.x.copy_(p.x)
        found = flat(sparse_step(late))
    stream.synchronize()
    assert same(expected, found), "an op did not run on the current stream"
    return "equal to the default stream"


def two_streams(ctx: Context) -> str:
    """Two steps at once, a thread each, share neither a workspace nor where sizes are read back."""
    device = device_of(ctx)
    _cuda_only(device)
    problems = [problem_of(ctx, seed) for seed in (0, 1)]
    expected = [flat(sparse_step(p)) for p in problems]
    streams = [torch.cuda.Stream(device) for _ in problems]
    torch.cuda.synchronize(device)

    def step(stream: torch.cuda.Stream, p: Problem) -> list[Tensor]:
        with torch.cuda.stream(stream):
            return flat(sparse_step(p))

    with ThreadPoolExecutor(2) as pool:
        for turn in range(10):
            found = list(pool.map(step, streams, problems))
            torch.cuda.synchronize(device)
            for mine, theirs in zip(found, expected, strict=True):
                assert same(mine, theirs), f"turn {turn}: two streams disturb each other"
    return "10 turns"


def captured_graph(ctx: Context) -> str:
    """Encode with a fixed capacity, decode, TopK of few tokens: captured once, on new tokens."""
    device = device_of(ctx)
    _cuda_only(device)
    p = problem_of(ctx)
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
        assert same(list(captured), list(expected)), f"replay {seed} differs from the eager call"
    return "3 replays equal to eager calls"


def lossy_graph(ctx: Context) -> str:
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


def sizeless_graph(ctx: Context) -> str:
    """Without `max_nnz` an encoder says that it cannot wait, and the capture goes on."""
    device, told = device_of(ctx), ""
    _cuda_only(device)
    p = problem_of(ctx)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        try:
            gsf.jumprelu_encode(p.x, p.W_enc, p.b_enc, p.threshold)
        except RuntimeError as error:
            told = str(error)
        doubled = 2 * p.x
    p.x.add_(1)
    graph.replay()
    assert "pass max_nnz" in told, told
    assert torch.equal(doubled, 2 * p.x), "the capture was lost"
    return told


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(100 + seed)
