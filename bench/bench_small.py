"""Small problems, where the fixed costs of a call decide, against dense PyTorch.

    pytest bench/bench_small.py --benchmark-only [--shapes named] [-k forward] [--against compile]

float32 and unpacked weights. Encoders by the functions, `forward` by a JumpReLU module, all without
gradients; `training` is loss and gradients of all five parameters by `SAE.loss`. Theirs: `addmm`
with `where`, `relu` and `topk`, a second `addmm`, and autograd of the same loss. Results are
compared before anything is timed. A time is that of one call among many that follow each other.
`half`: a JumpReLU of whose latents half are active.

Floor: the encoder's 2 n d F operations at the rate of float32 fused multiply-adds. What a call
costs beyond it is what this suite is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ceilings
import dense
import torch
from interleaving import Call, Case, Measured, Spec, replay
from problems import Size, autoencoder
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.report import OURS
from gemmascope_fast.training import L0, Reconstruction

DENSE = "dense fp32"
ACTIVE = 16
"""Active latents per token."""
REPEATS = 20
"""Calls that are timed together: one takes 20 us to 20 ms."""
OPS = ("jumprelu_encode", "topk_encode", "forward", "training")

SIZES = {
    "toy": [Size(2, 64, 256)],
    "quick": [Size(1, 640, 2048)],
    "small": [Size(1, 64, 256), Size(8, 256, 1024)],
    "named": [
        *(Size(n, 64, 256) for n in (1, 64, 1024)),
        *(Size(8, 256, 1024), Size(64, 768, 2048)),
    ],
}
HALF = {"named": [Size(64, 64, 256), Size(64, 768, 2048)]}


def specs(shapes: str) -> list[Spec]:
    ops = ("forward",) if shapes == "quick" else OPS
    chosen = [(op, size, ACTIVE, "") for size in SIZES.get(shapes, []) for op in ops]
    chosen += [("jumprelu_encode", size, size.d_sae // 2, "-half") for size in HALF.get(shapes, [])]
    return [
        Spec(
            f"small-{op}-{size}{told}",
            (OURS, DENSE),
            functools.partial(case_of, op, size, l0),
            dense.ON_REQUEST,
        )
        for op, size, l0, told in chosen
    ]


def test_small(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


def case_of(op: str, size: Size, l0: int) -> Case:
    x, sae = autoencoder(size, l0)
    calls = training(x, sae) if op == "training" else inference(op, x, sae, l0)
    assert_same(op, calls)
    entries = sae.encode(x).nnz
    chain = {
        "forward": ("jumprelu_encode", "decode"),
        "training": ("jumprelu_encode", "decode", "sae_backward"),
    }
    product = 2 * size.n * size.d * size.d_sae
    return Case(
        op=op,
        shape=size.shape("fp32", l0),
        calls=calls,
        ceilings={"fp32 unit": ceilings.fp32_unit},
        floor=lambda rates: product / rates["fp32 unit"],
        floor_text="fp32 product of the encoder",
        cost=dense.cost(chain.get(op, (op,)), size, entries, size.d_sae),
        bound="flops",
        facts={"entries": entries, "path": str(gsf.explain())},
        repeats=REPEATS,
    )


def inference(op: str, x: Tensor, sae: gsf.SAE, l0: int) -> dict[str, Call]:
    W_enc, b_enc, W_dec, b_dec = (t.detach() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    assert sae.threshold is not None
    threshold = sae.threshold.detach()

    def ours() -> object:
        if op == "topk_encode":
            return gsf.topk_encode(x, W_enc, b_enc, l0)
        return sae(x) if op == "forward" else gsf.jumprelu_encode(x, W_enc, b_enc, threshold)

    def theirs() -> object:
        if op == "topk_encode":
            return dense.topk(x, W_enc, b_enc, l0)
        pre = torch.addmm(b_enc, x, W_enc)
        acts = torch.where(pre > threshold, pre, 0)
        return torch.addmm(b_dec, acts, W_dec) if op == "forward" else acts

    return {
        OURS: without_gradients(ours),
        DENSE: without_gradients(theirs),
        dense.COMPILED: without_gradients(dense.compiled(theirs)),
    }


def without_gradients(call: Callable[[], object]) -> Call:
    def run(_: int) -> object:
        with torch.no_grad():
            return call()

    return run


def training(x: Tensor, sae: gsf.SAE) -> dict[str, Call]:
    """Loss and gradients, of `mean |recon - x|^2` and the mean L0."""
    terms, parameters = [Reconstruction(), L0(dense.LAMBDA)], list(sae.parameters())
    compiled = dense.compiled(dense.loss)
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: sae.loss(x, terms=terms)[0],
        DENSE: lambda: dense.loss(sae, x),
        dense.COMPILED: lambda: compiled(sae, x),
    }

    def gradients_of(loss: Callable[[], Tensor]) -> Call:
        return lambda _: (*torch.autograd.grad(value := loss(), parameters), value.detach())

    return {name: gradients_of(loss) for name, loss in losses.items()}


def assert_same(op: str, calls: dict[str, Call]) -> None:
    """What ours finds is what dense PyTorch does, to rounding."""
    found: Any = calls[OURS](0)
    expected: Any = calls[DENSE](0)
    if op == "topk_encode":
        found, expected = found.as_topk()[0].sort().values, expected[0].sort().values
    elif op == "jumprelu_encode":
        found = found.to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
