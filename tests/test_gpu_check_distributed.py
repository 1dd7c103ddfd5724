"""Part `distributed` of `bench/gpu_check.py`: what runs where, and what it would not let pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu import distributed  # noqa: E402
from gpu.context import Context, Settings, Skip  # noqa: E402
from gpu.distributed import Way, way_of  # noqa: E402
from gpu.state import Results  # noqa: E402


class Told:
    """`Ranks` whose ranks answer what they are told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def run(self, world: int, body: Any, *args: Any) -> list[Any]:
        return [self.answer] * world


def test_ranks_talk_over_nccl_where_each_has_a_device() -> None:
    assert way_of("cpu", 0) == Way("gloo", "cpu", 2) and way_of("cuda", 1).backend == "gloo"
    assert way_of("cuda", 2) == Way("nccl", "cuda", 2) and way_of("cuda", 3).world == 3
    assert way_of("cuda", 8).meshes == [(1, 4), (2, 2)]
    assert [way_of("cuda", n).meshes for n in (2, 3)] == [[(1, 2), (2, 1)], [(1, 3)]]


def test_one_device_is_told_what_it_cannot_do(tmp_path: Path) -> None:
    ctx = Context("distributed", Settings("cuda", quick=True), Results(tmp_path / "r.json"), 100)
    ctx.row("several ranks, nccl", distributed._no_nccl)
    (row,) = ctx.results.rows("distributed")
    assert row["status"] == "skipped" and row["reason"].startswith("one CUDA device, and NCCL")
    with pytest.raises(Skip, match="one CUDA device: gloo tells nothing about links"):
        distributed._link(ctx, way_of("cuda", 1), None, "tp")


@pytest.mark.parametrize("drift", [2 * distributed.DRIFT, float("nan")])
def test_a_run_that_drifts_from_one_process_fails(drift: float) -> None:
    with pytest.raises(AssertionError, match="'topk'"):
        distributed._training(Told({"jumprelu": 0.0, "topk": drift}), 1, 2)
    with pytest.raises(AssertionError, match="relative to the largest"):
        distributed._resharding(Told(drift), way_of("cpu", 0))
    with pytest.raises(AssertionError, match="relative to the largest"):
        distributed._one_rank(Told(drift))


def test_the_model_counts_what_a_collective_sends(tmp_path: Path) -> None:
    ctx = Context("distributed", Settings("cuda", quick=True), Results(tmp_path / "r.json"), 100)
    payload = {"reconstruction": 4 * 64 * 64, "counts": 8 * 2048}

    class Timed(Told):
        def run(self, world: int, body: Any, sent: dict[str, int]) -> list[Any]:
            assert sent.items() >= payload.items()
            return [dict.fromkeys(sent, 1e-3)] * world

    found = distributed._link(ctx, way_of("cuda", 4), Timed(None), "tp")["collectives"]
    by_name = {row["name"]: row for row in found}
    assert by_name["reconstruction"]["sent"] == 2 * 3 / 4 * payload["reconstruction"]
    assert by_name["counts"]["sent"] == 3 / 4 * payload["counts"]
    assert by_name["counts"]["model_s"] == pytest.approx(2e-5 + by_name["counts"]["sent"] / 4.5e11)


def test_what_a_rank_said_last_comes_first() -> None:
    def fail() -> dict[str, Any]:
        raise AssertionError("rank 1: Traceback\n  somewhere\nValueError: the cause\n")

    with pytest.raises(RuntimeError, match=r"^ValueError: the cause\nrank 1: Traceback"):
        distributed._plain(fail)
