"""`bench/quality.py`: what it trains, what it keeps, its verdicts, the documented table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmascope_fast.demo.activations import Activations

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import quality  # noqa: E402

SMALL = ["--steps", "4", "--d-sae", "96", "--max-tokens", "1260"]


def corpus() -> Activations:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3780, 16, generator=generator) * torch.linspace(3, 0.2, 16) + 1
    spans = torch.zeros(len(x), 2, dtype=torch.int64)
    return Activations(x, torch.arange(len(x)), spans, "", 126)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Trainings in this process, on random activations; what was trained."""
    done: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes threads only wait for each other

    def here(command: list[str], check: bool, **_: Any) -> Any:
        at = command.index("--one")
        done.append(f"{command[at + 1]} {command[at + 2]}")
        rest = command[command.index(quality.__file__) + 1 :]
        assert command[0] == "nice" and check and quality.main(rest) == 0

    monkeypatch.setattr(quality, "collect", lambda *_: (corpus(), Path("x")))
    monkeypatch.setattr(quality, "commit", lambda: "abc")
    monkeypatch.setattr(quality.subprocess, "run", here)
    yield done
    torch.set_num_threads(threads)


def test_every_run_is_trained_once_and_compared_with_its_dense_one(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SMALL, "--work", str(tmp_path), "--launcher", "nice", "--seeds", "0", "4"]
    assert quality.main([*command, "--json", str(tmp_path / "q.json")]) == 0
    assert trained == [f"{name} {seed}" for seed in (0, 4) for name in quality.RUNS]
    found = json.loads((tmp_path / "q.json").read_text())
    rows = {row["run"]: row for row in found["summary"]}
    by = {(r["run"], r["seed"]): r for r in found["runs"]}
    assert by["exact", 0] | {"run": "", "seconds": 0} == by["fused", 0] | {"run": "", "seconds": 0}
    values = [by[name, 0]["fvu"] for name in ("fused", "bf16", "8bit", "exact_momentum")]
    assert len(set(values)) == 4 and by["fused", 0]["fvu"] != by["fused", 4]["fvu"]
    gaps = [by["bf16", s]["fvu"] / by["dense", s]["fvu"] - 1 for s in (0, 4)]
    assert rows["bf16"]["fvu_gap"] == {
        "mean": pytest.approx(sum(gaps) / 2),
        "least": min(gaps),
        "most": max(gaps),
    }
    assert rows["live_momentum"]["against"] == "dense_momentum" and "against" not in rows["dense"]
    assert found["settings"]["d_sae"] == 96 and found["command"].endswith(" ".join(SMALL))
    assert "| bf16 weights |" in capsys.readouterr().out
    assert quality.main(command) == 0 and len(trained) == 18  # all were kept
    fewer = ["--steps", "2", "--runs", "dense", "fused", "--seeds", "0"]
    assert quality.main([*command, *fewer]) == 0 and trained[18:] == ["dense 0", "fused 0"]


def result(run: str, seed: int, fvu: float, l0: float) -> dict[str, Any]:
    return {"run": run, "seed": seed, "fvu": fvu, "l0": l0, "dead": 7}


@pytest.mark.parametrize(
    "fvu, l0, holds",
    [
        (0.2019, 30.5, [True, True]),
        (0.1979, 30.5, [False, True]),
        (0.2021, 29.3, [False, False]),
        (float("nan"), 30.0, [False, True]),
    ],
)
def test_a_target_missed_by_one_seed_is_missed(fvu: float, l0: float, holds: list[bool]) -> None:
    results = [result(name, seed, 0.2, 30.0) for name in ("dense", "fused") for seed in (0, 1)]
    rows = quality.summary([*results, result("dense", 2, 0.2, 30.0), result("fused", 2, fvu, l0)])
    found = quality.checks(rows)
    assert [check["holds"] for check in found] == holds and {c["run"] for c in found} == {"fused"}


def test_the_documented_table_is_that_of_the_results() -> None:
    found = json.loads((ROOT / "bench" / "results" / "quality.json").read_text())
    written = (ROOT / "docs" / "quality.md").read_text().splitlines()
    lines = quality.table(quality.summary(found["runs"]))
    assert [line for line in written if line.startswith("|")] == lines
    assert quality.checks(found["summary"]) == found["checks"]
    assert any(found["commit"] in line for line in written)
