"""Configuration table and tuner of the Triton kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import launching, tuning

TABLE = {
    "default": [{"shape": {}, "config": {"BLOCK": 1, "num_warps": 4}}],
    "sm_80": [
        {"shape": {"n": 8192, "d": 512}, "config": {"BLOCK": 2, "num_warps": 4}},
        {"shape": {"n": 16, "d": 512}, "config": {"BLOCK": 3, "num_warps": 4}},
    ],
    "sm_90": [{"shape": {"n": 8192}, "config": {"BLOCK": 4, "num_warps": 8}}],
}
META = torch.device("meta")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table for kernel "k" alone, and an empty folder of tuned rows, which is returned."""
    package = tmp_path / "kernels"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "k.json").write_text(json.dumps(TABLE))
    monkeypatch.setattr(launching, "__file__", str(package / "launching.py"))
    monkeypatch.setattr(launching, "TUNED", tmp_path / "tuned")
    for cached in (launching.table, launching._nearest):
        cached.cache_clear()
    monkeypatch.setattr(launching, "COMPILE_TARGET", "sm_80")
    monkeypatch.setattr(tuning, "_done", set())
    yield tmp_path / "tuned"
    for cached in (launching.table, launching._nearest):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("target", "shape", "block"),
    [
        ("sm_80", {"n": 5000, "d": 512}, 2),
        ("sm_80", {"n": 1, "d": 512}, 3),
        ("sm_80", {"n": 300, "d": 512}, 3),  # a factor of 19 from 16, 27 from 8192
        ("sm_80", {"n": 0, "d": 0}, 3),
        ("sm_86", {"n": 8192, "d": 512}, 2),
        ("sm_90", {"n": 1, "d": 9}, 4),
        ("sm_120", {"n": 1, "d": 9}, 4),
        ("sm_75", {"n": 1, "d": 9}, 1),
        ("gfx942", {"n": 1, "d": 9}, 1),
    ],
)
def test_the_nearest_row_of_the_device_serves(table, monkeypatch, target, shape, block):
    monkeypatch.setattr(launching, "COMPILE_TARGET", target)
    assert launching.choose("k", META, **shape)["BLOCK"] == block


def test_a_caller_cannot_change_the_table(table):
    launching.choose("k", META, n=1, d=1)["BLOCK"] = 77
    assert launching.choose("k", META, n=1, d=1)["BLOCK"] == 3


def test_an_empty_grid_is_no_launch_and_a_huge_one_is_an_error():
    class Kernel:
        __name__ = "k"

        def __getitem__(self, grid):
            raise AssertionError("launched")

    launching.launch(Kernel(), 0)
    with pytest.raises(ValueError, match="k: 2147483648 programs exceed the largest grid"):
        launching.launch(Kernel(), 2**31)


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [(0, (64,), 1), (5, (64,), 8), (900, (64, 16), 64), (3, (64, 16), 16)],
)
def test_block_covers_the_size_within_bounds(size, bounds, expected):
    assert launching.block(size, *bounds) == expected


def test_tf32_only_on_request():
    wide, narrow = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert launching.dot_precision(wide, narrow) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert launching.dot_precision(wide, narrow) == "tf32"
        assert launching.dot_precision(narrow, narrow) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_by_the_backend_setting():
    wide = torch.zeros(1)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert launching.dot_precision(wide) == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- the tuner


def test_descent_finds_the_best_corner_and_ignores_what_cannot_run():
    def seconds(config):
        if config["BLOCK"] > 64:
            return float("inf")
        return 100 / config["BLOCK"] + abs(config["num_stages"] - 3) + config["num_warps"]

    start = {"BLOCK": 16, "num_warps": 8, "num_stages": 1}
    assert tuning.descend(start, seconds) == {"BLOCK": 64, "num_warps": 1, "num_stages": 3}


def test_descent_keeps_what_noise_cannot_beat():
    start = {"BLOCK": 16, "num_warps": 8}
    times = iter([1.0, *[0.98] * 100])
    assert tuning.descend(start, lambda config: next(times)) == start


def test_a_tuned_row_is_kept_and_serves_its_shape_only(table, monkeypatch):
    used = []

    def run():
        used.append(launching.choose("k", META, n=8000, d=512)["BLOCK"])

    # the clock: a call lasts the longer the further its block is from 8
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: sum(abs(b - 8) + 1 for b in used))
    tuning.tune(run, META)
    row = {"shape": {"n": 8192, "d": 512}, "config": {"BLOCK": 8, "num_warps": 4}}
    assert json.loads((table / "k.json").read_text()) == {"sm_80": [row]}
    assert launching.choose("k", META, n=8000, d=512)["BLOCK"] == 8
    assert launching.choose("k", META, n=16, d=512)["BLOCK"] == 3
    before = len(used)
    tuning.tune(run, META)
    assert len(used) == before + 1, "measured once, then only asked which kernels there are"


def test_tuned_rows_of_another_version_are_left_out(table):
    table.mkdir()
    row = {"shape": {"n": 8192, "d": 512}, "config": {"TILE": 8}}
    (table / "k.json").write_text(json.dumps({"sm_80": [row]}))
    assert launching.choose("k", META, n=8192, d=512) == {"BLOCK": 2, "num_warps": 4}


def test_a_failing_candidate_is_no_candidate(table):
    def run():
        if launching.choose("k", META, n=8000, d=512) != {"BLOCK": 2, "num_warps": 4}:
            raise RuntimeError("out of resource: shared memory")

    tuning.tune(run, META)
    assert not (table / "k.json").exists()
    assert launching.OVERRIDE is None
