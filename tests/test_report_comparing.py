"""`bench --compare`: a slower op is found, noise and slower machines are not; messages."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gemmascope_fast import cli

pytest.importorskip("scipy", reason="needs scipy: pip install scipy")

from gemmascope_fast.report import comparing  # noqa: E402
from gemmascope_fast.report.rows import OURS  # noqa: E402

ROUNDS = 9


def results(
    seed: int, ours: float = 1.0, machine: float = 1.0, alone: float = 1.0, noise: float = 0.05
) -> dict[str, Any]:
    """Two cases: `decode` beside dense PyTorch, `passes` beside a ceiling alone.

    Args:
        seed: of the noise.
        ours, alone: factors on our times of the two cases.
        machine: factor on every time and on no ratio.
        noise: standard deviation of a time's logarithm; a quarter of it is a round's own.
    """
    draw = random.Random(seed)
    mood = [draw.gauss(0, noise) for _ in range(ROUNDS)]

    def times(seconds: float) -> list[float]:
        return [seconds * machine * 2 ** (m + draw.gauss(0, noise / 4)) for m in mood]

    def one(group: str, contender: str, data: list[float], **more: Any) -> dict[str, Any]:
        told = {"op": group, "contender": contender, "speeds": {}, **more}
        stats = {"median": sorted(data)[ROUNDS // 2], "data": data}
        return {"group": group, "stats": stats, "extra_info": told}

    speeds = {"random rows": [1 / t for t in times(0.1)]}
    rows = [one("decode", OURS, times(0.01 * ours)), one("decode", "dense", times(0.9))]
    rows += [one("decode", "ours, direct", times(0.02))]
    rows += [one("passes", OURS, times(0.03 * alone), speeds=speeds)]
    info = {"processor": "AMD", "threads": 2, "instructions": "avx512", "torch": "2.13"}
    return {"machine_info": info, "commit_info": {"id": "0" * 40, "dirty": False}} | {
        "benchmarks": rows
    }


def verdicts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    return {c.name: c.verdict for c in comparing.compared(a, b)[0]}


@pytest.mark.parametrize("seed", range(5))
def test_runs_that_differ_by_noise_or_by_the_machine_have_no_verdict(seed: int) -> None:
    same = dict.fromkeys(("decode", "decode, direct", "passes"), comparing.SAME)
    assert verdicts(results(seed), results(seed + 50)) == same
    assert verdicts(results(seed), results(seed + 50, machine=3.0)) == same


def test_a_slower_op_is_found_and_a_faster_one_is_told() -> None:
    found = verdicts(results(0), results(1, ours=1.3, alone=0.7))
    expected = (comparing.SLOWER, comparing.SAME, comparing.FASTER)
    assert found == dict(zip(("decode", "decode, direct", "passes"), expected, strict=True))


def test_noise_hides_what_is_smaller_than_itself() -> None:
    assert verdicts(results(0, noise=1.0), results(1, ours=1.15, noise=1.0))["decode"] == "same"


def test_ratios_are_those_of_medians_after_the_yardstick() -> None:
    changes = {c.name: c for c in comparing.compared(results(0), results(1, 2.0, 5.0, 0.5))[0]}
    assert changes["decode"].ratio == pytest.approx(2.0, rel=0.05)
    assert changes["passes"].ratio == pytest.approx(0.5, rel=0.05)
    for c in changes.values():
        assert c.low <= c.ratio <= c.high
    assert [c.yardstick for c in changes.values()] == ["dense", "dense", "random rows"]


def test_the_command_prints_a_table_and_fails_on_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    slower = results(1, ours=1.5)
    slower["benchmarks"] = [b for b in slower["benchmarks"] if b["group"] == "decode"]
    for file, found in zip(files, (results(0), slower), strict=True):
        file.write_text(json.dumps(found))
    assert cli.main(["bench", "--compare", *map(str, files)]) == 1
    printed = capsys.readouterr().out
    line = next(text for text in printed.splitlines() if text.startswith("decode  "))
    assert "SLOWER" in line and line.endswith("dense") and " 1.5" in line
    assert f"only in {files[0]}: passes" in printed and "1 of 2 slower by more than" in printed
    assert cli.main(["bench", "--compare", str(files[0]), str(files[0])]) == 0


@pytest.mark.parametrize("wrong", ["missing", "rounds", "common"])
def test_files_that_cannot_be_compared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    a, b = results(0), results(1)
    for one in b["benchmarks"]:
        if wrong == "rounds":
            del one["stats"]["data"]
        one["group"] += wrong
    for name, found in (("a", a), ("b", b)):
        (tmp_path / name).write_text(json.dumps(found))
    second = tmp_path / ("c" if wrong == "missing" else "b")
    assert cli.main(["bench", "--compare", str(tmp_path / "a"), str(second)]) == 2
    messages = {"missing": "No such file", "rounds": "no single rounds", "common": "no case in"}
    assert messages[wrong] in capsys.readouterr().err
