"""Encoders against dense PyTorch, by the speed of the int8 tile.

    pytest bench/bench_encode.py --benchmark-only [--shapes named] [-k topk] [--against compile]

float32 weights, about 64 active latents a token. Ours: `gsf.pack`ed weights; unpacked, whose int8
codes are made in the call; direct float32, without screening. Theirs: `torch.addmm` and `where`,
`relu` and `topk`, or a `topk` of the whole batch, in float32 and bfloat16. Ours have the same bits,
and what dense PyTorch finds, before anything is timed. In `training` entries of the straight-
through window are stored too, with the feature-major view, and weights are not packed.

Floor: 2 n d F operations at the rate of the int8 tile on operands in L1; a byte per weight at the
rate of a large read where that is more, for n <= 16.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import ceilings
import dense
import torch
from interleaving import Call, Case, Measured, Rates, Spec, Target, replay
from problems import BANDWIDTH, L0, Size, encoder_inputs, encoder_rows, threshold_for
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.report import OURS

UNPACKED, DIRECT, FP32, BF16 = "ours, unpacked", "ours, direct", "dense fp32", "dense bf16"
FEW = 32
"""From so many tokens on, unpacked weights are screened."""
TRAINING = "Gaussian, training"
OUTLIERS = ("outliers", "outliers scattered")
CHECKED = 16
"""Tokens that are compared with dense PyTorch."""

SIZES = {
    "toy": [Size(33, 192, 768)],
    "quick": [Size(256, d, 16_384) for d in (640, 1152, 2560, 5376)],
    "small": [Size(256, 640, 16_384)],
    "named": [Size(256, 1152, 65_536), Size(256, 1152, 262_144), Size(256, 5376, 65_536)],
}
TOPK = {**SIZES, "quick": [Size(256, 1152, 16_384)]}
BATCHTOPK = {shapes: sizes[:1] for shapes, sizes in SIZES.items() if shapes != "quick"}
FEW_TOKENS = {
    "toy": [Size(1, 192, 768)],
    "quick": [Size(1, 1152, 16_384)],
    "small": [Size(1, 640, 16_384), Size(16, 640, 16_384)],
    "named": [Size(1, 5376, 65_536), Size(16, 5376, 65_536)],
}
TRAINED = {
    "toy": [Size(64, 192, 768)],
    "quick": [],
    "small": [Size(512, 640, 16_384)],
    "named": [Size(1024, 1152, 65_536)],
}
MASSIVE = {
    "toy": [Size(33, 192, 768)],
    "quick": [],
    "small": [Size(256, 640, 16_384)],
    "named": [Size(256, 640, 16_384), Size(256, 1152, 65_536), Size(256, 5376, 16_384)],
}


def specs(shapes: str) -> list[Spec]:
    """Cases of one set of sizes; those of the same weights stand together."""
    if shapes not in SIZES:
        return []
    plain = [("jumprelu", size, "Gaussian") for size in SIZES[shapes] + FEW_TOKENS[shapes]]
    plain += [("topk", size, "Gaussian") for size in TOPK[shapes]]
    plain += [("batchtopk", size, "Gaussian") for size in BATCHTOPK.get(shapes, [])]
    plain += [("jumprelu", size, TRAINING) for size in TRAINED[shapes]]
    plain += [("jumprelu", size, inputs) for size in MASSIVE[shapes] for inputs in OUTLIERS]
    plain.sort(key=lambda case: (case[1].d, case[1].d_sae, -case[1].n))
    return [spec(*case, judged=shapes == "named") for case in plain]


def spec(op: str, size: Size, inputs: str, judged: bool) -> Spec:
    contenders = (OURS, UNPACKED, DIRECT, FP32, BF16)
    if (
        size.n < FEW or inputs == TRAINING
    ):  # the direct path is what unpacked weights get; or packing
        contenders = (OURS, DIRECT, FP32, BF16)
    told = "" if inputs == "Gaussian" else "-" + inputs.removeprefix("Gaussian, ").replace(" ", "-")
    build = functools.partial(case_of, op, size, inputs, judged)
    return Spec(f"{op}-{size}{told}", contenders, build, dense.ON_REQUEST)


def test_encode(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


# ---- a case


def case_of(op: str, size: Size, inputs: str, judged: bool) -> Case:
    x, rows = encoder_inputs(size, inputs), encoder_rows(size.d, size.d_sae)
    b_enc, threshold = torch.zeros(size.d_sae), threshold_for(x, rows)
    calls = ours(op, x, rows, b_enc, threshold, training=inputs == TRAINING)
    calls |= theirs(op, x, rows, b_enc, float(threshold[0]))
    facts = checked(op, calls, x, rows, b_enc, threshold)
    nnz = round(facts["entries_per_token"] * size.n)
    cost = ops.TABLE[f"{op}_encode"].cost(n=size.n, d=size.d, d_sae=size.d_sae, nnz=nnz)
    product = cost.flops

    def floor(rates: Rates) -> float:
        weights = size.d * size.d_sae / rates["read"] if size.n < FEW else 0.0
        return max(product / rates["int8 tile"], weights)

    return Case(
        op=f"{op}_encode",
        shape=size.shape(inputs),
        calls=calls,
        ceilings={
            **{"int8 tile": ceilings.int8_tile, "fp32 unit": ceilings.fp32_unit},
            **{"fp32 matmul": ceilings.fp32_matmul, "read": ceilings.read},
        },
        floor=floor,
        floor_text="int8 product" if size.n >= FEW else "int8 product or weights read",
        cost=cost,
        bound="flops",
        facts=facts,
        targets=targets(op, size, inputs, product) if judged else (),
    )


def ours(
    op: str, x: Tensor, rows: Tensor, b_enc: Tensor, threshold: Tensor, training: bool
) -> dict[str, Call]:
    """Our ways; in training nothing is packed, and the threshold wants its gradient."""
    if training:
        threshold = threshold.clone().requires_grad_()
    width = BANDWIDTH if training else 0.0

    def encode(weights: Tensor | gsf.PackedEncoder, mode: str) -> gsf.SparseActs:
        with screening(mode):
            if op == "topk":
                return gsf.topk_encode(x, weights, b_enc, L0)
            if op == "batchtopk":
                return gsf.batchtopk_encode(x, weights, b_enc, L0)
            return gsf.jumprelu_encode(x, weights, b_enc, threshold, bandwidth=width)

    W_enc = rows.t()
    packed = W_enc if training else gsf.pack(W_enc)
    return {
        OURS: lambda _: encode(packed, ""),
        UNPACKED: lambda _: encode(W_enc, ""),
        DIRECT: lambda _: encode(W_enc, "never"),
    }


@contextlib.contextmanager
def screening(mode: str) -> Iterator[None]:
    """Overrule the encoders' choice of a path meanwhile; "" leaves it to them."""
    name = "GEMMASCOPE_FAST_SCREEN"
    before = os.environ.pop(name, None)
    try:
        if mode:
            os.environ[name] = mode
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def theirs(op: str, x: Tensor, rows: Tensor, b_enc: Tensor, threshold: float) -> dict[str, Call]:
    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> object:
        if op == "jumprelu":
            return dense.jumprelu(x, W_enc, b_enc, threshold)
        return (dense.topk if op == "topk" else dense.batchtopk)(x, W_enc, b_enc, L0)

    half = [t.to(torch.bfloat16) for t in (x, rows, b_enc)]
    compiled = dense.compiled(encode)
    return {
        FP32: lambda _: encode(x, rows.t(), b_enc),
        dense.COMPILED: lambda _: compiled(x, rows.t(), b_enc),
        BF16: lambda _: encode(half[0], half[1].t(), half[2]),
    }


# ---- before timing


def checked(
    op: str, calls: dict[str, Call], x: Tensor, rows: Tensor, b_enc: Tensor, threshold: Tensor
) -> dict[str, Any]:
    """Same bits on every path of ours, dense PyTorch's entries; what screening let through."""
    direct: Any = calls[DIRECT](0)
    facts: dict[str, Any] = {"entries_per_token": direct.indices.numel() / direct.n}
    for name in (UNPACKED, OURS):
        if name not in calls:
            continue
        found: Any = calls[name](0)
        for part in ("offsets", "indices", "values", "gate"):
            assert torch.equal(getattr(found, part), getattr(direct, part)), (name, part)
    report = gsf.explain()
    facts |= {"path": str(report), "candidates_per_token": report.candidates / direct.n}
    facts |= {"rescored_per_token": report.rescored / direct.n}
    pre = torch.addmm(b_enc, x[:CHECKED], rows.t())
    acts = direct.detach()[:CHECKED].to_dense()
    allowed = 1e-5 * float(x.norm(dim=1).max())
    assert_selected(op, acts, pre, threshold, allowed)
    return facts


def assert_selected(op: str, acts: Tensor, pre: Tensor, threshold: Tensor, allowed: float) -> None:
    """`acts` are the `pre` that the rule selects, but for those within rounding of its limit."""
    if op == "jumprelu":
        limit = threshold
    elif op == "topk":
        limit = pre.topk(L0).values[:, -1:]
    else:
        limit = acts[acts > 0].min()  # of the part of the batch that is looked at
    expected = torch.where(pre > limit, pre, 0)
    decided = (pre - limit).abs() > allowed
    torch.testing.assert_close(acts[decided], expected[decided], rtol=0, atol=allowed)


# ---- the numbers


def targets(op: str, size: Size, inputs: str, product: int) -> tuple[Target, ...]:
    if size.n == 1:
        return (Target("x dense fp32", 3.0, lambda m: m.ratio(FP32)),)
    if size.n != 256 or inputs != "Gaussian" or op == "batchtopk":
        return ()
    six = Target("x dense fp32", 6.0, lambda m: m.ratio(FP32))
    if op == "topk":
        return (six,)
    return (
        six,
        Target("x dense bf16", 1.7, lambda m: m.ratio(BF16)),
        Target("of the int8 tile", 0.65, lambda m: m.of_floor()),
        Target(
            *("of the fp32 unit, direct", 0.75),
            lambda m: product / m.median(DIRECT) / m.rates["fp32 unit"],
        ),
    )
