"""`pytest bench`: what it interleaves, hands to pytest-benchmark, asserts, judges and reports."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import bench_backward  # noqa: E402
import bench_encode  # noqa: E402
import dense  # noqa: E402
import interleaving  # noqa: E402
import memory  # noqa: E402
import problems  # noqa: E402
from interleaving import Case, Measured, Spec, Stages, Target  # noqa: E402
from memory import Memory  # noqa: E402

import gemmascope_fast as gsf  # noqa: E402
from gemmascope_fast import cli  # noqa: E402
from gemmascope_fast.costs import Cost  # noqa: E402
from gemmascope_fast.report import OURS, rows, tables  # noqa: E402

SHAPE = {"n": 4, "d": 8, "d_sae": 16, "l0": 2, "inputs": "Gaussian"}


def case(calls: dict[str, Any], ceilings: dict[str, Any], **more: Any) -> Case:
    named = {"op": "decode", "shape": SHAPE, "floor": lambda r: 6 / r["copy"], "floor_text": "x"}
    cost = {"cost": Cost(10**12, 2 * 10**9), "bound": "flops"}
    return Case(**{**named, **cost, "calls": calls, "ceilings": ceilings, **more})


@pytest.fixture
def default_malloc() -> Iterator[None]:
    yield
    memory.keep_freed_memory(False)


# ---- rounds


def test_rounds_interleave_contenders_and_ceilings_and_begin_with_another(
    default_malloc: None,
) -> None:
    said: list[str] = []

    def say(name: str, found: float = 0.0) -> Any:
        return lambda at: said.append(f"{name}{at}") or found

    measured = interleaving.measure(
        case({OURS: say("a"), "dense": say("b")}, {"copy": say("c", 2.0)}), 0.0, 3, 9, keep=True
    )
    assert said[:6] == ["a0", "a0", "a1", "b0", "b0", "b1"]  # first call, memory, its time
    assert said[6:] == ["c0", *("a0 b1 c0 b1 a2 c1 a2 b3 c2".split())]
    assert [len(taken) for taken in measured.samples.values()] == [3, 3]
    assert measured.speeds == {"copy": [2.0, 2.0, 2.0]}


def test_calls_too_short_for_the_clock_are_timed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter([10.0, 13.0])
    monkeypatch.setattr(interleaving.time, "perf_counter", lambda: next(ticks))
    said: list[int] = []
    assert interleaving.seconds_of(said.append, 7, repeats=6) == 0.5
    assert said == [7] * 6


def measured_case(**more: Any) -> Measured:
    samples = {OURS: [1.0, 3.0, 2.0], "dense": [8.0, 20.0, 9.0], "ours, direct": [4.0, 4.0, 4.0]}
    sizes = {name: Memory(3 << 20, 1 << 20) for name in samples}
    return Measured(case({}, {}, **more), samples, {"copy": [3.0, 4.0, 2.0]}, sizes)


def test_ratios_floors_and_verdicts_are_those_of_medians() -> None:
    goals = (
        Target("x dense", 4.5, lambda m: m.ratio("dense")),
        Target("of the floor", 0.8, lambda m: m.of_floor()),
        Target("MiB", 2.0, lambda m: m.memory[OURS].peak / 2**20, at_most=True),
    )
    found = measured_case(targets=goals)
    told = found.told(OURS)
    assert told["ratios"] == {"dense": 4.5, "ours, direct": 2.0}
    assert (told["floor_s"], told["of_floor"], told["tflops"]) == (1.5, 0.75, 0.5)
    assert told["cost"] == {"flops": 10**12, "bytes": 2 * 10**9} and told["gb_per_s"] is None
    assert told["speeds"] == {"copy": [3.0, 4.0, 2.0]} and found.told("dense")["speeds"] == {}
    assert measured_case(bound="bytes").told(OURS)["gb_per_s"] == 1.0
    assert [(v["found"], v["met"]) for v in told["targets"]] == [
        *((4.5, True), (0.75, False), (3.0, False))
    ]
    assert found.told("dense")["targets"] == [] and found.told("dense")["of_floor"] == 1.5 / 9
    lines = found.lines()
    assert lines[0].startswith(OURS) and "75 % of the floor, +3.0 MiB  4.50x dense" in lines[0]
    assert "2.25x dense" in lines[2] and lines[-1] == "  **missed**: 3 <= 2 MiB"


def test_pytest_benchmark_is_given_the_measured_rounds() -> None:
    class Benchmark:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}
            self.data: list[float] = []

        def pedantic(self, target: Any, rounds: int) -> None:
            for _ in range(rounds):
                began = interleaving.rounds_clock()
                target()
                self.data.append(interleaving.rounds_clock() - began)

    benchmark = Benchmark()
    interleaving.replay(benchmark, measured_case(), "dense")
    assert benchmark.data == pytest.approx([8.0, 20.0, 9.0], abs=1e-9)
    assert benchmark.extra_info["contender"] == "dense"


def test_the_parts_of_a_call_are_those_of_its_measured_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter([0.0, 5.0, 6.0, 10.0, 11.0, 13.0, 20.0, 23.0, 27.0, 30.0, 31.0, 36.0])
    monkeypatch.setattr(interleaving.time, "perf_counter", lambda: next(ticks))
    stages = Stages()
    for _ in range(4):
        stages.begin()
        stages.end("encode")
        stages.end("optimizer")
    assert stages.medians(3) == {"encode": 1.0, "optimizer": 4.0}, "the first call warms up"
    told = measured_case(stages={OURS: stages}).told(OURS)
    assert told["stages"] == stages.medians(3)


def test_optional_contenders_take_part_when_asked_for() -> None:
    spec = Spec("one", (OURS,), lambda: case({}, {}), dense.ON_REQUEST)
    assert spec.chosen([""]).contenders == (OURS,)
    assert spec.chosen(["saelens", "compile"]).contenders == (OURS, dense.COMPILED)


def test_a_compiled_contender_that_finds_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: function(x) + 1)
    with pytest.raises(AssertionError, match="not close"):
        dense.compiled(lambda x: 2 * x)(torch.ones(2))


# ---- memory


def test_memory_of_a_call_is_its_peak_and_what_its_result_keeps(default_malloc: None) -> None:
    def call(_: int) -> Tensor:
        large = torch.ones(12 << 20, dtype=torch.uint8)
        return large[: 4 << 20].clone()

    call(0)
    for keep in (True, False):
        memory.keep_freed_memory(keep)
        found = memory.memory_of(call)
        assert 15 <= found.peak / 2**20 < 18 and 3 <= found.kept / 2**20 < 6


def test_tensors_of_one_size_that_live_together_are_counted() -> None:
    def call(_: int) -> Tensor:
        x = torch.ones(40)
        y = x + 1
        del x
        z = y * 2
        return z + torch.ones(30).sum()

    assert memory.most_alive(call, 40) == 3  # y, z and the sum of z


# ---- what must hold before anything is timed


def test_an_encoder_that_misses_an_entry_is_not_timed() -> None:
    pre = torch.tensor([[0.5, 2.0, 1.0, 3.0]])
    threshold = torch.ones(4)
    bench_encode.assert_selected("jumprelu", torch.tensor([[0, 2.0, 0, 3]]), pre, threshold, 1e-6)
    for wrong in ([0.0, 2, 0, 0], [0.5, 2, 0, 3], [0, 2, 0, 3.1]):
        with pytest.raises(AssertionError):
            bench_encode.assert_selected("jumprelu", torch.tensor([wrong]), pre, threshold, 1e-6)


@pytest.mark.parametrize("before", [None, "always"])
def test_an_overruled_path_does_not_outlive_its_call(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left at "never", every step timed afterwards would multiply in float32: 1.0 s, not 0.3 s."""
    name, spec = "GEMMASCOPE_FAST_SCREEN", bench_encode.specs("toy")[0]
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    calls = spec.build().calls
    calls[bench_encode.DIRECT](0)
    assert f"{name}=never" in str(gsf.explain()) and os.environ.get(name) == before
    calls[OURS](0)
    assert "never" not in str(gsf.explain()) and os.environ.get(name) == before


def test_gradients_that_differ_are_not_timed() -> None:
    right = (torch.ones(3), torch.ones(2)), torch.tensor(1.0)
    off = (torch.ones(3), torch.tensor([1.0, 1.001])), torch.tensor(1.0)
    calls = {bench_backward.DENSE: right, OURS: right, bench_backward.COMPOSED: off}
    with pytest.raises(AssertionError, match="encode and decode: a gradient differs by"):
        bench_backward.assert_gradients_agree({n: lambda _, r=r: r for n, r in calls.items()})


def test_no_rounding_decides_a_gate_of_the_autoencoder() -> None:
    x, sae = problems.autoencoder(problems.Size(32, 64, 512))
    pre = (x @ sae.W_enc).detach()
    distance = (pre - sae.threshold.detach()).abs()
    assert distance.min() > 1.5e-5
    assert (distance - problems.BANDWIDTH / 2).abs().min() > 1.5e-5
    assert 56 <= float((pre > sae.threshold).sum(1).float().mean()) <= 72


@pytest.mark.parametrize("firing", problems.FIRING)
def test_batches_have_distinct_ascending_latents(firing: str) -> None:
    size = problems.sized(problems.Size(32, 64, 2048), firing)
    for acts in problems.batches(firing, 32, size.d_sae, 64, 2):
        parts = acts.indices.split(acts.offsets.diff().tolist())
        assert len(parts) == 32 and acts.offsets[-1] == acts.nnz > 32
        assert all((latents.diff() > 0).all() for latents in parts)
        assert firing == "trace" or acts.nnz == 32 * 64


def test_a_skewed_distribution_touches_fewer_latents() -> None:
    drawn = {f: problems.batches(f, 256, 8192, 33, 1)[0] for f in problems.FIRING}
    touched = {firing: problems.touched(acts) for firing, acts in drawn.items()}
    assert touched["log-normal"] < 0.7 * touched["uniform"]
    assert touched["trace"] < 0.7 * touched["uniform"]


# ---- a run


def test_a_run_writes_every_op_and_the_report_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Toy sizes of the whole suite, one round each, as `make bench` runs them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "150")
    chosen = "topk-n33 or n1-192 or (fp32 and (uniform or trace)) or training-n32 or step"
    chosen += " or small-forward"
    out = tmp_path / "cpu.json"
    command = ["bench", "--shapes", "toy", "--rounds", "1", "-k", chosen, "--out", str(out)]
    assert cli.main(command) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["machine_info"]["threads"] == 1 and "node" not in found["machine_info"]
    assert set(found["commit_info"]) <= {"id", "dirty", "time"}
    assert found["command"].startswith("python -m gemmascope_fast bench --shapes toy --rounds 1 -k")
    measured = rows.cpu_rows(found)
    ops = {"jumprelu_encode", "topk_encode", "batchtopk_encode", "decode", "training", "step"}
    ops.add("forward")
    assert {row["op"] for row in measured} == ops | set(bench_backward.ROWS)
    for row in measured:
        assert row["of_floor"] > 0 and min(row["rates"].values()) > 0
        assert row["facts"] and row["cost"]["flops"] > 0
        assert {len(found) for found in row["speeds"].values()} == {1}
        assert row["times"][OURS]["rounds_s"] == [row["times"][OURS]["median_s"]]
    (step,) = (row for row in measured if row["op"] == "step")
    for name, taken in step["times"].items():
        parts = taken["stages"]
        assert list(parts) == ["encode", "decode and loss", "backward", "optimizer"], name
        assert 0.8 * taken["median_s"] < sum(parts.values()) <= taken["median_s"]
    assert "training step " in printed and f"Results: {out}" in printed
    text = tables.tables(rows.read([tmp_path]))
    assert "| decode | 32 | 128 | 1,024 | 64 | fp32, uniform, " in text
    assert "| decode | 32 | 128 | 8,192 | 3" in text and "x embedding_bag" in text


def test_a_suite_that_fails_is_told_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMMASCOPE_FAST_CPU", "no such thing")
    out = tmp_path / "cpu.json"
    assert cli.main(["bench", "step", "--shapes", "toy", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "bench_step failed:" in said and "no such thing" in said and not out.exists()
