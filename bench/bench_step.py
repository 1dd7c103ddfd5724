"""A training step with its optimizer: gsf.optim.Adam, fused and not, against dense PyTorch.

    pytest bench/bench_step.py --benchmark-only [--shapes named] [--against compile]

A JumpReLU SAE in float32, `mean |recon - x|^2` and the mean L0: encode, decode, loss, backward and
update with `Adam(fused=True)`, the same unfused, and dense autograd with
`torch.optim.Adam(fused=True)`. Every call takes the next of three batches. Fused and unfused have
the same losses to the bit, which is asserted, dense PyTorch within rounding.

Encode, decode with the loss, backward and optimizer are timed apart inside each step; a fused
backward leaves the gradients of the matrices to the optimizer.

Floor: the int8 product of the encoder, then the touched rows of both matrices and their moments,
read and written, at the rate of random rows. Memory: beyond weights and moments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ceilings
import dense
import torch
from interleaving import Call, Case, Measured, Spec, Stages, Target, replay
from memory import most_alive
from problems import L0, Size, autoencoder
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.report import OURS

UNFUSED, DENSE = "ours, unfused", "dense fp32"
LR, BETAS = 1e-5, (0.0, 0.999)
SIZES = {
    "toy": [Size(32, 128, 1024)],
    "quick": [Size(512, 640, 16_384), Size(512, 1152, 16_384)],
    "small": [Size(512, 640, 16_384)],
    "named": [Size(1024, 1152, 65_536)],
}


def specs(shapes: str) -> list[Spec]:
    return [
        Spec(
            f"step-{size}",
            (OURS, UNFUSED, DENSE),
            functools.partial(case_of, size, shapes == "named"),
            dense.ON_REQUEST,
        )
        for size in SIZES.get(shapes, [])
    ]


def test_step(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


def case_of(size: Size, judged: bool, l0: float = L0, unfused: bool = True) -> Case:
    """Every contender has weights and moments of its own; the compiled one shares dense's."""
    made = {n: autoencoder(size, l0) for n in (OURS, UNFUSED, DENSE) if unfused or n != UNFUSED}
    stages = {name: Stages() for name in made}
    calls = {name: contender(name, *each, stages[name]) for name, each in made.items()}
    x, sae = made[OURS]
    acts = sae.encode(x).detach()
    latents = int(acts.fired().sum())
    for turn in range(2):
        losses = {name: call(turn) for name, call in calls.items()}
        assert losses[OURS] == losses.get(UNFUSED, losses[OURS]), losses
        torch.testing.assert_close(losses[DENSE], losses[OURS], rtol=1e-4, atol=0)
    apart = most_alive(calls[OURS], x.numel())
    calls[dense.COMPILED] = contender(dense.COMPILED, *made[DENSE], Stages())
    return Case(
        op="step",
        shape=size.shape("fp32", l0),
        calls=calls,
        **floor_of(size, latents, sae.W_dec.detach(), acts.nnz),
        stages=stages,
        facts={
            "touched": latents,
            "entries": acts.nnz,
            "batch_tensors": f"{apart} of {x.nbytes / 2**20:.1f} MiB alive at most",
        },
        targets=targets(size, apart * x.nbytes) if judged else (),
    )


def floor_of(size: Size, latents: int, W_dec: Tensor, entries: int | None = None) -> dict[str, Any]:
    """Floor and cost of a step with float32 moments, as arguments of a case."""
    product = 2 * size.n * size.d * size.d_sae
    chain = ("jumprelu_encode", "decode", "fused_sparse_step")
    moved = 8 * latents * size.d * 4
    return {
        "ceilings": {
            **{"int8 tile": ceilings.int8_tile, "fp32 matmul": ceilings.fp32_matmul},
            "random rows": ceilings.random_rows([W_dec]),
        },
        "floor": lambda rates: product / rates["int8 tile"] + moved / rates["random rows"],
        "floor_text": "int8 product, touched weights and moments read and written",
        "cost": dense.cost(chain, size, size.n * L0 if entries is None else entries, latents),
        "bound": "flops",
    }


def contender(name: str, x: Tensor, sae: gsf.SAE, stages: Stages) -> Call:
    if name in (DENSE, dense.COMPILED):
        adam: Any = torch.optim.Adam(sae.parameters(), LR, betas=BETAS, fused=True)
        if name == dense.COMPILED:  # one graph: its parts cannot be told apart
            whole = dense.compiled(dense.loss)
            return step(adam, lambda batch: whole(sae, batch), batches(x))
        return step(adam, lambda batch: dense.loss(sae, batch, stages.end), batches(x), stages)
    ours = gsf.optim.Adam(sae, LR, BETAS, fused=name == OURS)
    return step(ours, lambda batch: sparse_loss(sae, batch, stages), batches(x), stages)


def sparse_loss(sae: gsf.SAE, x: Tensor, stages: Stages) -> Tensor:
    acts = sae.encode(x)
    stages.end("encode")
    error = (sae.decode(acts) - x).square().sum(-1).mean()
    return error + dense.LAMBDA * acts.l0().mean()


def step(
    optimizer: torch.optim.Optimizer,
    evaluate: Callable[[Any], Tensor],
    arranged: Sequence[Any],
    stages: Stages | None = None,
) -> Call:
    """One training step, on the next of the batches; returns its loss."""
    told = stages or Stages()

    def run(turn: int) -> Tensor:
        told.begin()
        optimizer.zero_grad()
        value = evaluate(arranged[turn % len(arranged)])
        told.end("decode and loss")
        value.backward()
        told.end("backward")
        optimizer.step()
        optimizer.zero_grad()
        told.end("optimizer")
        return value.detach()

    return run


def batches(x: Tensor) -> list[Tensor]:
    """X itself, and two other arrangements of it."""
    return [x, x.flip(0).contiguous(), x.roll(1, 1)]


def targets(size: Size, apart: int) -> tuple[Target, ...]:
    def beyond(m: Measured) -> float:
        return (m.memory[OURS].peak - apart) / (size.n * size.d_sae * 4)

    return (
        Target("x dense fp32 with Adam(fused=True)", 12.0, lambda m: m.ratio(DENSE)),
        Target("n*F beyond state and [n, d] tensors", 0.05, beyond, at_most=True),
    )
