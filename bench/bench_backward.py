"""The backward passes by the speed of random rows, and forward + backward against dense autograd.

    pytest bench/bench_backward.py --benchmark-only [--shapes named] [-k sae_backward]

`decode_backward`, `encode_backward`, `sae_backward` with every gradient of weights, and
`fused_sparse_step`, which updates them: float32 and bfloat16 weights, a tenth of the entries off,
three distributions of the latents: 64 a token uniform or log-normal, and a recorded trace. Results
are those of the reference, within rounding. Floor: the rows of every touched latent that are read
or written, once each, at the rate of random rows of that size: of W_dec and its gradient, W_enc and
its gradient, or W_dec and both gradients; the fused step reads and writes both matrices and their
float32 moments.

`training`: loss and gradients of all five parameters of a JumpReLU SAE (`mean |recon - x|^2` and
the mean L0), by `SAE.loss`, by the module's `encode` and `decode`, and by dense autograd in
float32. Floor: the int8 product of the encoder, then the rows of W_dec and both gradients.
Gradients are compared first. Memory is judged beyond the gradients and the `[n, d]` tensors, which
are counted; weights are never packed here, their codes live for a block of 48 latents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ceilings
import dense
import torch
from interleaving import Call, Case, Measured, Spec, Target, replay
from memory import most_alive
from problems import DTYPES, FIRING, Size, autoencoder, batches, decoders_of, sized, touched
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.report import OURS
from gemmascope_fast.training import L0, Reconstruction

COMPOSED, DENSE = "ours, encode and decode", "dense fp32"
ROWS = {"decode_backward": 2, "encode_backward": 2, "sae_backward": 3, "fused_sparse_step": 4}
"""Rows of weights or gradients that a pass reads or writes for every touched latent."""
OFF = 0.1
"""Entries in the window below their threshold."""
WIDTH = 0.1
"""Of that window: entries have values 0.5 to 1.5, thresholds 0 to 1."""
TOLERANCE = 1e-4
"""Of a gradient, in the Frobenius norm; of the loss, a tenth of it."""

SIZES = {
    "toy": [Size(32, 128, 1024)],
    "quick": [Size(512, 1152, 16_384)],
    "small": [Size(512, 640, 16_384)],
    "named": [Size(1024, 1152, 65_536)],
}


def specs(shapes: str) -> list[Spec]:
    judged = shapes == "named"
    passes = [
        Spec(
            f"{op}-{dtype}-{sized(size, firing)}-{firing}",
            (OURS,),
            functools.partial(pass_case, op, dtype, sized(size, firing), firing, judged),
        )
        for dtype in DTYPES
        if shapes != "quick"
        for size in SIZES.get(shapes, [])
        for firing in FIRING
        for op in ROWS
    ]
    return passes + [
        Spec(
            f"training-{size}",
            (OURS, COMPOSED, DENSE),
            functools.partial(training_case, size, judged),
            dense.ON_REQUEST,
        )
        for size in SIZES.get(shapes, [])
    ]


def test_backward(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


# ---- single passes


@dataclass(frozen=True)
class Entries:
    """Operands of every pass."""

    x: Tensor
    W_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    d_recon: Tensor
    csr: tuple[Tensor, Tensor, Tensor, Tensor]  # offsets, indices, values, gate
    view: tuple[Tensor, Tensor]
    d_values: Tensor
    d_gate: Tensor


def operands(dtype: str, size: Size, firing: str) -> Entries:
    W_dec, W_enc_rows = decoders_of(dtype, size.d, size.d_sae)
    acts = batches(firing, size.n, size.d_sae)[0]
    g = torch.Generator().manual_seed(4)
    gate = (torch.rand(acts.nnz, generator=g) >= OFF).float()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(W_dec.dtype)

    return Entries(
        x=draw(size.n, size.d),
        W_enc=W_enc_rows.t(),
        threshold=torch.rand(size.d_sae, generator=g),
        W_dec=W_dec,
        d_recon=draw(size.n, size.d),
        csr=(acts.offsets, acts.indices, acts.values * gate, gate),
        view=torch.ops.gemmascope_fast.by_feature(acts.offsets, acts.indices, size.d_sae),
        d_values=torch.randn(acts.nnz, generator=g),
        d_gate=torch.randn(acts.nnz, generator=g),
    )


def passes(e: Entries, op: str, namespace: str = ops.NAMESPACE) -> Call:
    """Call of one pass, by the compiled library or by the reference."""
    run = getattr(getattr(torch.ops, namespace), op).default
    args: tuple[Any, ...]
    if op == "decode_backward":
        args = (e.d_recon, *e.csr[:3], e.W_dec, *e.view, True, True, True)
    elif op == "encode_backward":
        encoder = (e.x, e.W_enc, e.threshold, WIDTH)
        args = (e.d_values, e.d_gate, *encoder, *e.csr, *e.view, True, True, True, True)
    elif op == "sae_backward":
        args = (*both(e), False)
    else:
        return fused_step(
            run, e, [adam_state(e.W_dec), adam_state(e.W_dec)], [0.0, 0.0, 0.999, 1e-8]
        )
    return lambda _: run(*args)


def both(e: Entries) -> tuple[Any, ...]:
    """What `sae_backward` and the fused step read."""
    weights = (e.x, e.W_enc, e.threshold, WIDTH, e.W_dec)
    return (*weights, e.d_recon[None], [len(e.W_dec)], *e.csr, None, e.d_gate, *e.view)


def fused_step(
    run: Callable[..., object], e: Entries, states: list[list[Tensor]], rates: list[float]
) -> Call:
    """The steps of both matrices, numbered from 1, without momentum."""
    count = itertools.count(1)

    def step(_: int) -> object:
        t = next(count)
        return run(*both(e), *states, rates, rates, *([t, 0, 0, 0, seed] for seed in (1, 1)))

    return step


def adam_state(rows: Tensor) -> list[Tensor]:
    empty = torch.empty(0)
    moments = torch.rand(rows.shape, generator=torch.Generator().manual_seed(5))
    return [empty, moments, empty.to(torch.uint8), torch.zeros(len(rows), dtype=torch.int64)]


def pass_case(op: str, dtype: str, size: Size, firing: str, judged: bool) -> Case:
    e = operands(dtype, size, firing)
    call = passes(e, op)
    if op != "fused_sparse_step":
        assert_same(call(0), passes(e, op, ops.REFERENCE)(0), dtype)
    else:
        assert_updates_as_composed(e)
    acts = batches(firing, size.n, size.d_sae)[0]
    latents = touched(acts)
    itemsize = e.W_dec.element_size()
    moved = ROWS[op] * latents * size.d * itemsize
    if op == "fused_sparse_step":
        moved += 4 * latents * size.d * 4  # two second moments, read and written
    held = judged and op == "decode_backward"
    return Case(
        op=op,
        shape=size.shape(f"{dtype}, {firing}", acts.nnz / size.n),
        calls={OURS: call},
        ceilings={
            "random rows": ceilings.random_rows([e.W_dec, e.W_enc.t()]),
            "copy": ceilings.copy,
        },
        floor=lambda rates: moved / rates["random rows"],
        floor_text="touched rows once, at the rate of random rows",
        cost=ops.TABLE[op].cost(n=size.n, d=size.d, d_sae=latents, nnz=acts.nnz, itemsize=itemsize),
        bound="bytes",
        facts={"touched": latents, "entries": acts.nnz},
        targets=(Target("of random rows", 0.6, lambda m: m.of_floor()),) if held else (),
    )


def assert_same(found: Any, expected: Any, dtype: str) -> None:
    """Every result is the reference's, up to rounding of its largest elements."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        scale = float(theirs.float().abs().max()) if theirs.numel() else 0.0
        close = 1e-5 if dtype == "fp32" else 2.0**-7
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close * scale, msg=f"output {i}")


def assert_updates_as_composed(e: Entries) -> None:
    """The fused step leaves in W_dec and its moments what `sae_backward` and Adam leave there."""
    rates, rule = [1e-3, 0.0, 0.999, 1e-8], [1, 0, 0, 0, 1]
    own = replace(e, W_enc=e.W_enc.clone(), W_dec=e.W_dec.clone())
    states = [adam_state(e.W_dec), adam_state(e.W_dec)]
    fused_step(torch.ops.gemmascope_fast.fused_sparse_step, own, states, rates)(0)
    gradient = passes(e, "sae_backward")(0)[4]  # type: ignore[index]
    weight, state = e.W_dec.clone(), adam_state(e.W_dec)
    torch.ops.gemmascope_fast.adam_step_(weight, state, gradient, rates, rule)
    assert not torch.equal(weight, e.W_dec)
    if weight.dtype == torch.float32:  # in bfloat16 the gradient between the two ops is rounded
        assert torch.equal(own.W_dec, weight) and torch.equal(states[1][1], state[1])
    torch.testing.assert_close(own.W_dec, weight, rtol=2**-7, atol=2e-3)


# ---- forward and backward


def training_case(size: Size, judged: bool) -> Case:
    x, sae = autoencoder(size)
    terms, parameters = [Reconstruction(), L0(dense.LAMBDA)], list(sae.parameters())
    compiled = dense.compiled(dense.loss)

    def composed() -> Tensor:
        acts = sae.encode(x)
        error = (sae.decode(acts) - x).square().sum(-1).mean()
        return error + dense.LAMBDA * acts.l0().mean()

    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: sae.loss(x, terms=terms)[0],
        COMPOSED: composed,
        DENSE: lambda: dense.loss(sae, x),
        dense.COMPILED: lambda: compiled(sae, x),
    }

    def gradients_of(loss: Callable[[], Tensor]) -> Call:
        return lambda _: (torch.autograd.grad(value := loss(), parameters), value.detach())

    calls = {name: gradients_of(loss) for name, loss in losses.items()}
    worst = assert_gradients_agree(calls)
    acts = sae.encode(x).detach()
    latents = int(acts.fired().sum())
    batch_tensors = most_alive(calls[OURS], x.numel())
    product = 2 * size.n * size.d * size.d_sae
    moved = ROWS["sae_backward"] * latents * size.d * 4
    return Case(
        op="training",
        shape=size.shape("fp32"),
        calls=calls,
        ceilings={
            **{"int8 tile": ceilings.int8_tile, "fp32 matmul": ceilings.fp32_matmul},
            "random rows": ceilings.random_rows([sae.W_dec.detach(), sae.W_enc.detach().t()]),
        },
        floor=lambda rates: product / rates["int8 tile"] + moved / rates["random rows"],
        floor_text="int8 product, touched rows once",
        cost=dense.cost(("jumprelu_encode", "decode", "sae_backward"), size, acts.nnz, latents),
        bound="flops",
        facts={
            "touched": latents,
            "gradients_agree_within": worst,
            "batch_tensors": f"{batch_tensors} of {x.nbytes / 2**20:.1f} MiB alive at most",
        },
        targets=targets(size, batch_tensors * x.nbytes) if judged else (),
    )


def assert_gradients_agree(calls: dict[str, Call]) -> float:
    """Losses and all gradients; returns the largest difference, relative in Frobenius norm."""
    expected, loss = calls[DENSE](0)  # type: ignore[misc]
    worst = 0.0
    for name in (OURS, COMPOSED):
        found, value = calls[name](0)  # type: ignore[misc]
        torch.testing.assert_close(value, loss, rtol=TOLERANCE / 10, atol=0, msg=name)
        for ours, theirs in zip(found, expected, strict=True):
            off = float((ours - theirs).norm() / theirs.norm())
            assert off < TOLERANCE, f"{name}: a gradient differs by {off:.2g}"
            worst = max(worst, off)
    return worst


def targets(size: Size, batch_bytes: int) -> tuple[Target, ...]:
    def beyond(m: Measured) -> float:
        memory = m.memory[OURS]
        return (memory.peak - memory.kept - batch_bytes) / (size.n * size.d_sae * 4)

    return (
        Target("x dense fp32 autograd", 15.0, lambda m: m.ratio(DENSE)),
        Target("n*F beyond gradients and [n, d] tensors", 0.05, beyond, at_most=True),
    )
