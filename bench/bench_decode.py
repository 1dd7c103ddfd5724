"""Decoding against dense PyTorch and `embedding_bag`, by the speed of random rows.

    pytest bench/bench_decode.py --benchmark-only [--shapes named] [-k trace]

float32 and bfloat16 weights, three distributions of the latents: 64 a token drawn uniformly or by
log-normal rates, and a recorded trace, whose dictionary has 8,192 latents. Rows are cold: two
dictionaries and four batches in turns, and the next contender takes others. Theirs:
`addmm` of the `[n, d_sae]` activations, made before; `embedding_bag(mode="sum",
per_sample_weights=...)` and the bias. All in the dtype of the weights, results compared first.

Floor: every row that is touched once, and the result, at the rate of random rows of that size.
"""

from __future__ import annotations

import functools
from typing import Any

import ceilings
import torch
from interleaving import Call, Case, Measured, Spec, Target, replay
from problems import DTYPES, FIRING, L0, Size, batches, decoders_of, sized, touched
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.report import OURS

DENSE, BAG = "dense", "embedding_bag"
SIZES = {
    "toy": [Size(32, 128, 1024)],
    "quick": [Size(256, 1152, 16_384)],
    "small": [Size(256, 640, 16_384)],
    "named": [Size(256, 1152, 65_536), Size(1024, 1152, 65_536)],
}


def specs(shapes: str) -> list[Spec]:
    return [
        Spec(
            f"decode-{dtype}-{sized(size, firing)}-{firing}",
            (OURS, DENSE, BAG),
            functools.partial(case_of, dtype, sized(size, firing), firing, shapes == "named"),
        )
        for dtype in DTYPES
        if shapes != "quick" or dtype == "fp32"
        for size in SIZES.get(shapes, [])
        for firing in FIRING
    ]


def test_decode(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


@torch.no_grad()
def case_of(dtype: str, size: Size, firing: str, judged: bool, l0: int = L0) -> Case:
    decoders = decoders_of(dtype, size.d, size.d_sae)
    drawn = batches(firing, size.n, size.d_sae, l0)
    calls = contenders(decoders, drawn, torch.randn(size.d))
    expected = calls[DENSE](0)
    for name in (OURS, BAG):  # bfloat16 sums of 64 products round to 1/16 in the largest results
        close = {"rtol": 1e-5, "atol": 1e-4} if dtype == "fp32" else {"rtol": 2e-2, "atol": 0.25}
        close["atol"] *= max(1, l0 // L0)  # sums in another order
        torch.testing.assert_close(calls[name](0), expected, **close, msg=name)
    rows = sum(touched(acts) for acts in drawn) / len(drawn)
    entries = sum(acts.nnz for acts in drawn) // len(drawn)
    itemsize = decoders[0].element_size()
    cost = ops.TABLE["decode"].cost(
        n=size.n, d=size.d, d_sae=round(rows), nnz=entries, itemsize=itemsize
    )
    line = size.d * itemsize
    return Case(
        op="decode",
        shape=size.shape(f"{dtype}, {firing}", entries / size.n),
        calls=calls,
        ceilings={"random rows": ceilings.random_rows(decoders), "copy": ceilings.copy},
        floor=lambda rates: (rows + size.n) * line / rates["random rows"],
        floor_text="touched rows once, at the rate of random rows",
        cost=cost,
        bound="bytes",
        facts={"touched": rows, "entries": entries},
        targets=targets(dtype, firing) if judged else (),
    )


def contenders(
    decoders: list[Tensor], drawn: list[gsf.SparseActs], bias: Tensor
) -> dict[str, Call]:
    dtype = decoders[0].dtype
    latents = [acts.indices.long() for acts in drawn]
    weights = [acts.values.to(dtype) for acts in drawn]
    their_bias = bias.to(dtype)
    rounded = [
        gsf.SparseActs(a.offsets, a.indices, w.float(), a.gate, a.shape)
        for a, w in zip(drawn, weights, strict=True)
    ]
    acts = rounded[0].to_dense().to(dtype)

    def ours(at: int) -> Tensor:
        return gsf.decode(rounded[at % len(rounded)], decoders[at % 2], bias)

    def bag(at: int) -> Tensor:
        i = at % len(latents)
        sums = torch.nn.functional.embedding_bag(
            latents[i],
            decoders[at % 2],
            drawn[i].offsets[:-1],
            mode="sum",
            per_sample_weights=weights[i],
        )
        return sums.add_(their_bias)

    def dense(at: int) -> Tensor:
        return torch.addmm(their_bias, acts, decoders[at % 2])

    return {OURS: no_grad(ours), DENSE: no_grad(dense), BAG: no_grad(bag)}


def no_grad(call: Call) -> Call:
    @functools.wraps(call)
    def run(at: int) -> object:
        with torch.no_grad():
            return call(at)

    return run


def targets(dtype: str, firing: str) -> tuple[Target, ...]:
    of_floor = Target("of random rows", 0.6, lambda m: m.of_floor())
    if dtype != "fp32" or firing == "trace":  # the others speak of 65,536 latents
        return (of_floor,)
    return (
        Target("x dense fp32", 90.0, lambda m: m.ratio(DENSE)),
        Target("x embedding_bag", 1.5, lambda m: m.ratio(BAG)),
        of_floor,
    )
