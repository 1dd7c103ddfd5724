"""Curves: an encoder, a decoder and a training step over d_sae and over L0, dense beside sparse.

    pytest bench/bench_sweep.py --benchmark-only --shapes sweep

d = 1152, float32. Over d_sae at L0 = 64; over L0 at 16,384 latents, up to a quarter of them, where
dense products win. Cases, floors and what is compared before timing are those of bench_encode.py,
bench_decode.py and bench_step.py, without targets.
"""

from __future__ import annotations

import functools
from typing import Any

import bench_decode
import bench_encode
import bench_step
import dense
from interleaving import Measured, Spec, replay
from problems import L0, Size

from gemmascope_fast.report import OURS

LATENTS = {
    "toy": [512, 1024],
    "sweep": [2048, 8192, 32_768, 65_536],
}
LARGE = {"toy": [], "sweep": [262_144]}
"""Latents for which the matrices of a step with dense moments would take 5 GB."""
ACTIVE = {"toy": [16, 128], "sweep": [16, 64, 256, 1024, 4096]}
FIXED = {"toy": Size(32, 128, 1024), "sweep": Size(512, 1152, 16_384)}


def specs(shapes: str) -> list[Spec]:
    if shapes not in FIXED:
        return []
    fixed = FIXED[shapes]
    wide = [Size(fixed.n, fixed.d, d_sae) for d_sae in LATENTS[shapes]]
    larger = [Size(fixed.n, fixed.d, d_sae) for d_sae in LARGE[shapes]]
    over = [(size, L0) for size in wide] + [(fixed, l0) for l0 in ACTIVE[shapes]]
    found = [encode(size) for size in [*wide, *larger]]
    found += [decode(size, l0) for size, l0 in over]
    return found + [step(size, l0) for size, l0 in over]


def test_sweep(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


def encode(size: Size) -> Spec:
    contenders = (OURS, bench_encode.FP32, bench_encode.BF16)
    build = functools.partial(bench_encode.case_of, "jumprelu", size, "Gaussian", judged=False)
    return Spec(f"sweep-jumprelu-{size}", contenders, build, dense.ON_REQUEST)


def decode(size: Size, l0: int) -> Spec:
    contenders = (OURS, bench_decode.DENSE, bench_decode.BAG)
    build = functools.partial(bench_decode.case_of, "fp32", size, "uniform", judged=False, l0=l0)
    return Spec(f"sweep-decode-{size}-l0-{l0}", contenders, build)


def step(size: Size, l0: int) -> Spec:
    contenders = (OURS, bench_step.DENSE)
    build = functools.partial(bench_step.case_of, size, judged=False, l0=l0, unfused=False)
    return Spec(f"sweep-step-{size}-l0-{l0}", contenders, build, dense.ON_REQUEST)
