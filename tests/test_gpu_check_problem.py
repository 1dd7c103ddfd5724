"""What `bench/gpu_check.py` times: statistics, calibration, its own assertions, its verdicts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from gpu import checks, passes, problem, targets, timing  # noqa: E402
from gpu.context import Shape  # noqa: E402
from gpu.rows import OURS, compose  # noqa: E402

CPU = torch.device("cpu")
FIRINGS = ("uniform", "log-normal")


def fail(error: BaseException) -> Any:
    raise error


# ---- statistics


def test_median_and_spread() -> None:
    found = timing.summarise([3.0, 1.0, 2.0, 10.0])
    assert found == {"median_s": 2.5, "min_s": 1.0, "max_s": 10.0, "rounds": 4}


def test_contenders_that_cannot_run_are_told_and_the_others_timed() -> None:
    late = iter([None, None, None])  # warm-up, memory, time; then memory runs out
    found = timing.compare(
        {
            OURS: lambda: time.sleep(0.001),
            "large": lambda: fail(torch.OutOfMemoryError("CUDA out of memory")),
            "late": lambda: next(late, 0) is None or fail(torch.OutOfMemoryError("x")),
            "broken": lambda: fail(NotImplementedError("no kernel\nand more")),
            "absent": "needs a network",
        },
        CPU,
        budget_s=0.02,
    )
    assert found[OURS]["median_s"] >= 0.001
    assert timing.ROUNDS[0] <= found[OURS]["rounds"] <= timing.ROUNDS[1]
    assert found["large"] == found["late"] == {"unavailable": "does not fit"}
    assert found["broken"] == {"unavailable": "NotImplementedError: no kernel"}
    assert found["absent"] == {"unavailable": "needs a network"}


# ---- calibration


@pytest.mark.parametrize("firing", FIRINGS)
def test_thresholds_give_the_wanted_l0(firing: str) -> None:
    shape = Shape(512, 64, 8192, 32, firing)
    p = problem.problem(shape, CPU, decoder=False, dtype=torch.float32)
    l0 = float((checks.exact_pre(p, range(512)) > p.threshold).sum()) / 512
    assert abs(l0 - 32) < 3.2
    assert p.W_enc.t().is_contiguous()


def test_log_normal_rates_are_skewed_and_capped() -> None:
    rates = problem.firing_rates(16384, 64, "log-normal")
    assert float(rates.sum()) == pytest.approx(64, rel=1e-9)
    assert float(rates.max()) <= problem.LARGEST_RATE
    kept = rates[rates < problem.LARGEST_RATE].log()
    assert float(kept.std()) == pytest.approx(problem.SIGMA, rel=0.05)
    with pytest.raises(ValueError, match="denser"):
        problem.firing_rates(64, 16, "uniform")


@pytest.mark.parametrize("firing", FIRINGS)
def test_drawn_entries_are_csr_with_the_wanted_l0(firing: str) -> None:
    shape = Shape(512, 16, 2048, 32, firing)
    p = problem.problem(shape, CPU)
    e = problem.entries(shape, p.threshold)
    assert abs(e.nnz / 512 - 32) < 3.2
    pairs = e.rows * 2048 + e.indices
    assert bool((pairs.diff() > 0).all()), "ascending and distinct"
    assert torch.equal(e.offsets[1:], torch.bincount(e.rows, minlength=512).cumsum(0))
    by_feature = torch.ops.gemmascope_fast_reference.by_feature
    feature_offsets, permutation = by_feature(e.offsets, e.indices, 2048)
    assert torch.equal(e.feature_offsets, feature_offsets)
    assert torch.equal(e.permutation, permutation)
    pre = problem.dense_pre(e, shape, p.threshold, torch.bfloat16)
    on = e.gate > 0
    active = (pre > p.threshold.bfloat16()).nonzero()
    assert torch.equal(active, torch.stack([e.rows[on], e.indices[on].long()], 1))
    assert 0.01 < float((~on).float().mean()) < 0.06 and not e.values[~on].any()


# ---- what the benchmarks assert


def encoded(bandwidth: float = 0.0) -> tuple[problem.Problem, list[torch.Tensor]]:
    p = problem.problem(Shape(32, 64, 512, 16), CPU)
    op = torch.ops.gemmascope_fast_reference.jumprelu_encode
    return p, list(op(p.x, p.W_enc, p.b_enc, p.threshold, bandwidth, None, True))


def test_wrong_entries_are_caught() -> None:
    p, (offsets, indices, values, *_) = encoded()
    checks.encoded(p, offsets, indices, values)
    shorter = offsets.clone()
    shorter[-1] -= 1
    inactive = indices.clone()
    inactive[0] = next(j for j in range(512) if j not in indices[: offsets[1]].tolist())
    for args in (
        (shorter, indices, values),
        (offsets, inactive, values),
        (offsets, indices, values.bfloat16().float()),
        (offsets, indices, values * float("nan")),
    ):
        with pytest.raises(AssertionError):
            checks.encoded(p, *args)


def test_entries_off_the_gate_must_lie_in_the_window() -> None:
    p, (offsets, indices, values, gate, *_) = encoded(problem.BANDWIDTH)
    assert bool((gate == 0).any())
    checks.encoded(p, offsets, indices, values, gate)
    _, (offsets, indices, values, gate, *_) = encoded(20 * problem.BANDWIDTH)
    with pytest.raises(AssertionError, match="leaves the window"):
        checks.encoded(p, offsets, indices, values, gate)


def test_wrong_selections_reconstructions_and_gradients_are_caught() -> None:
    shape = Shape(32, 64, 512, 16)
    p = problem.problem(shape, CPU)
    top = torch.ops.gemmascope_fast_reference.topk_encode(p.x, p.W_enc, p.b_enc, 16, False)
    checks.selected(p, 16, *top[:3])
    with pytest.raises(AssertionError):
        checks.selected(p, 16, top[0], top[1], top[2].roll(1))

    e = problem.entries(shape, p.threshold)
    recon = torch.ops.gemmascope_fast_reference.decode(
        *e.csr, p.W_dec, p.b_dec, None, None, torch.bfloat16
    )
    checks.decoded(p, e, recon)
    with pytest.raises(AssertionError, match=r"recon\[0\]"):
        checks.decoded(p, e, recon.roll(1, 0))

    d_recon = torch.randn(32, 64).bfloat16()
    grads = list(passes.sparse_backward(p, e, d_recon)())
    bandwidth = problem.ENTRY_BANDWIDTH
    checks.differentiated(p, e, d_recon, grads, bandwidth)
    checks.differentiated(p, e, d_recon, passes.composed_backward(p, e, d_recon)(), bandwidth)
    for at, name in enumerate(("d_W_enc", "d_b_enc", "d_threshold", "d_W_dec", "d_b_dec")):
        wrong = [g.clone() for g in grads]
        wrong[at] *= 1.05
        with pytest.raises(AssertionError, match=name):
            checks.differentiated(p, e, d_recon, wrong, bandwidth)


def test_the_dense_contender_computes_the_same_gradients() -> None:
    shape = Shape(32, 64, 512, 16, "log-normal")
    p = problem.problem(shape, CPU, dtype=torch.float32)
    e = problem.entries(shape, p.threshold)
    d_recon = torch.randn(32, 64)
    pre = problem.dense_pre(e, shape, p.threshold, torch.float32)
    ours = passes.sparse_backward(p, e, d_recon)()
    theirs = passes.dense.backward(p, pre, d_recon, problem.ENTRY_BANDWIDTH)
    for mine, dense in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-4, atol=1e-3)


# ---- verdicts


def row(part: str, d_sae: int, times: dict[str, float], **more: Any) -> dict[str, Any]:
    taken = {k: {"median_s": v, "peak_extra_bytes": 1000} for k, v in times.items()}
    shape = Shape(8192, 5376, d_sae, more.pop("l0", 64), more.pop("firing", "uniform"))
    return compose(part, shape, taken, floor_s=0.9, floor="a copy", **more)


def test_targets_are_met_or_missed_by_the_measured_ratio() -> None:
    times = {OURS: 1.0, "matmul": 1.0 / 1.05, "dense eager": 1.3}
    met = {v["text"]: v["met"] for v in row("encode", 2**16, times)["targets"]}
    assert met == {
        **{"time over the plain matmul": True, "extra memory over n*F*2 bytes": True},
        "x the library's product and a compaction": None,
    }
    times["matmul"] = 1.0 / 1.08
    assert row("encode", 2**16, times)["targets"][0]["met"] is False
    goals = [v["goal"] for v in row("decode", 2**14, times)["targets"]]
    assert goals == [1.2, 0.85]
    skewed = row("decode", 2**14, times, firing="log-normal")["targets"]
    assert [(v["goal"], v["met"]) for v in skewed] == [(2.5, False), (0.85, True)]
    assert row("decode", 2**14, times, l0=16)["targets"] == [], "they speak of L0 = 64"


def test_what_was_not_measured_has_no_verdict() -> None:
    told = row("step", 2**16, {OURS: 1.0, "dense eager": 9.0})["targets"]
    assert [(v["goal"], v["met"]) for v in told] == [(3.5, None)]
    both = {OURS: 1.0, targets.OURS_ADAM: 2.0, targets.DENSE_ADAM: 9.0}
    told = row("step", 2**16, both)["targets"]
    assert [(v["found"], v["met"]) for v in told] == [(4.5, True)], "of the steps that update"
    both |= {targets.OURS_SCREENED: 1.5}
    told = row("step", 2**18, both)["targets"]
    assert [(v["found"], v["met"]) for v in told] == [(4.5, False), (6.0, True)]
    missing = row("topk", 2**16, {OURS: 1.0})["targets"]
    assert [v["met"] for v in missing] == [None]
    with pytest.raises(RuntimeError, match="does not fit"):
        none = {OURS: {"unavailable": "does not fit"}}
        compose("decode", Shape(1, 1, 1, 1), none, floor_s=None, floor="")


def test_the_training_run_is_judged_by_its_peak() -> None:
    shape = Shape(8192, 5376, 2**20, 300).json()
    for peak, met in ((79.0, True), (81.0, False), (None, None)):
        found = targets.verdicts("train_1m", {"shape": shape, "peak_gb": peak})
        assert [v["met"] for v in found] == [met]
