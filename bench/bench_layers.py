"""A training step of a dictionary over several layers against dense PyTorch.

    pytest bench/bench_layers.py --benchmark-only [--shapes named] [-k clt]

A crosscoder or a cross-layer transcoder with JumpReLU in float32: `mean |recon - target|^2` over
all layers and the mean L0 of all of them, `module.loss`, backward, and `Adam(fused=True)`. Theirs:
one product per layer into the outputs it reaches, the causal triangle packed as ours is, autograd,
`torch.optim.Adam(fused=True)`. Every call takes the next of three batches; the losses agree, which
is asserted.

Sizes are those of Gemma Scope 2: the crosscoder of Gemma 3 1B with 65k latents in all; a CLT with
the width and the latents per layer of the 262k one of Gemma 3 270M, of its first six layers, so
that dense PyTorch fits. `all layers` is that artefact itself, 18 layers, with 8-bit moments; of it
only ours is timed: dense PyTorch's weights, gradients and two moments are 26 GiB.

Floor: the int8 products of the encoders, then the touched rows of all matrices and their moments,
read and written, at the rate of random rows. Memory: beyond weights and moments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import ceilings
import torch
from bench_step import BETAS, LR, step
from dense import LAMBDA, Gate, L0Gate
from interleaving import Case, Measured, Spec, replay
from problems import BANDWIDTH, clear, threshold_for
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.costs import Cost
from gemmascope_fast.multilayer import MultiLayer
from gemmascope_fast.report import OURS
from gemmascope_fast.training import L0, Reconstruction

DENSE = "dense fp32"
ACTIVE = 100
"""Active latents per token, of all layers; Gemma Scope 2 has 50 and 150."""


@dataclass(frozen=True)
class Layers:
    """n tokens of L layers of width d, d_sae latents each."""

    kind: str
    n: int
    layers: int
    d: int
    d_sae: int
    beside: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-n{self.n}-{self.layers}x{self.d}x{self.d_sae}"

    def make(self) -> MultiLayer:
        kind = gsf.Crosscoder if self.kind == "crosscoder" else gsf.CrossLayerTranscoder
        draw = torch.Generator().manual_seed(0)
        jump = gsf.JumpReLU(bandwidth=BANDWIDTH)
        return kind(self.layers, self.d, self.d_sae, jump, generator=draw)


SIZES = {
    "toy": [Layers("clt", 32, 3, 64, 256), Layers("crosscoder", 32, 3, 64, 256)],
    "quick": [Layers("clt", 256, 4, 640, 4096)],
    "small": [Layers("clt", 256, 4, 640, 4096)],
    "named": [
        Layers("clt", 512, 6, 640, 14_560),
        Layers("crosscoder", 512, 4, 1152, 16_384),
        Layers("clt", 1024, 18, 640, 14_560, beside=False),
    ],
}


def specs(shapes: str) -> list[Spec]:
    return [
        Spec(
            f"layers-{size}",
            (OURS, DENSE) if size.beside else (OURS,),
            functools.partial(case_of, size),
        )
        for size in SIZES.get(shapes, [])
    ]


def test_layers(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


def case_of(size: Layers) -> Case:
    x, target, module = problem(size)
    adam = gsf.optim.Adam(module, LR, BETAS, fused=True, moments="fp32" if size.beside else "8bit")
    calls = {OURS: step(adam, functools.partial(sparse_loss, module), batches(x, target))}
    with torch.no_grad():
        acts = module.encode(x)
    entries, touched = [a.nnz for a in acts], [int(a.fired().sum()) for a in acts]
    del acts
    if size.beside:
        twin = problem(size)[2]
        theirs = torch.optim.Adam(twin.parameters(), LR, betas=BETAS, fused=True)
        calls[DENSE] = step(theirs, functools.partial(dense_loss, twin), batches(x, target))
        for turn in range(2):
            losses = {name: call(turn) for name, call in calls.items()}
            torch.testing.assert_close(losses[DENSE], losses[OURS], rtol=1e-4, atol=0)
    reached = [W.shape[1] for W in module.W_dec]
    product = 2 * size.n * size.d * size.d_sae * size.layers
    moved = 4 * 4 * sum(t * (size.d + m) for t, m in zip(touched, reached, strict=True))
    return Case(
        op=size.kind,
        shape={
            **{"n": size.n, "d": size.d, "d_sae": size.layers * size.d_sae, "l0": ACTIVE},
            "inputs": f"{size.layers} layers, fp32" + ("" if size.beside else ", 8-bit moments"),
        },
        calls=calls,
        ceilings={
            "int8 tile": ceilings.int8_tile,
            "random rows": ceilings.random_rows([module.W_dec[0].detach()]),
        },
        floor=lambda rates: product / rates["int8 tile"] + moved / rates["random rows"],
        floor_text="int8 products, touched weights and moments read and written",
        cost=cost(size, entries, reached, moved),
        bound="flops",
        facts={
            "entries": sum(entries),
            "touched": sum(touched),
            "weights_bytes": sum(p.nbytes for p in module.parameters()),
        },
    )


def cost(size: Layers, entries: list[int], reached: list[int], moved: int) -> Cost:
    """Encoders; then of each entry decode, dot and two gradients."""
    sparse = sum(e * (6 * m + 2 * size.d) for e, m in zip(entries, reached, strict=True))
    return Cost(2 * size.n * size.d * size.d_sae * size.layers + sparse, moved)


def problem(size: Layers) -> tuple[Tensor, Tensor, MultiLayer]:
    """x, target and the module; the same for the same size."""
    module, draw = size.make(), torch.Generator().manual_seed(1)
    x = torch.randn(size.n, size.layers, size.d, generator=draw)
    target = x if size.kind == "crosscoder" else torch.randn(x.shape, generator=draw)
    assert module.threshold is not None
    with torch.no_grad():
        for at, threshold in enumerate(module.threshold):
            part = x[:, at]
            threshold.copy_(threshold_for(part, module.W_enc[at].t(), ACTIVE / size.layers))
            clear(threshold, torch.addmm(module.b_enc[at], part, module.W_enc[at]))
    return x, target, module


def batches(x: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x, target), (x.flip(0), target.flip(0)), (x.roll(1, 2), target)]


def sparse_loss(module: MultiLayer, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module.loss(*batch, terms=(Reconstruction(), L0(LAMBDA)))[0]


def dense_loss(module: MultiLayer, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same by dense products: no outputs that a layer does not reach."""
    x, target = batch
    assert module.threshold is not None
    recon = module.b_dec.flatten().expand(len(x), -1).clone()
    l0 = torch.zeros(())
    for at in range(module.n_layers):
        pre = torch.addmm(module.b_enc[at], x[:, at], module.W_enc[at])
        acts = Gate.apply(pre, module.threshold[at])
        l0 = l0 + L0Gate.apply(pre, module.threshold[at]).sum(-1).mean()
        recon[:, -module.W_dec[at].shape[1] :] += acts @ module.W_dec[at]
    return (recon - target.flatten(1)).square().sum(-1).mean() + LAMBDA * l0
