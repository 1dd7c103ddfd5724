"""`python -m gemmascope_fast bench --report`: tables, verdicts, the README's part, plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemmascope_fast import cli, report


def row(part: str, d_sae: int, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        **{"part": part, "name": f"F={d_sae}", "status": "done", "commit": "abc"},
        "shape": {"n": 8192, "d": 5376, "d_sae": d_sae, "l0": 64, "firing": "uniform"},
        "times": {
            "gemmascope_fast": {"median_s": 0.00245, "peak_extra_bytes": 3 << 20},
            "ours, fixed capacity": {"median_s": 0.0024, "peak_extra_bytes": 3 << 20},
            "dense eager": {"median_s": 0.0049, "peak_extra_bytes": 300 << 20},
            "torch.compile": {"unavailable": "does not fit: needs 106 GiB"},
        },
        "ratios": {"ours, fixed capacity": 0.98, "dense eager": 2.0},
        **{"of_floor": 0.914, "tflops": None, "gb_per_s": 2311.4, "line": "one line"},
        "targets": [
            {"text": "x dense", "goal": 1.2, "at_most": False, "found": 2.0, "met": True},
            {"text": "of memory", "goal": 0.02, "at_most": True, "found": 0.03, "met": False},
            {"text": "x nobody", "goal": 5, "at_most": False, "found": None, "met": None},
        ],
    }
    found["shape"] |= changes.pop("shape", {})
    return found | changes


def results(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    parts = dict.fromkeys(
        (r["part"] for r in rows), {"status": "done", "seconds": 12.3, "reason": ""}
    )
    return {
        **{"schema": 1, "quick": False, "device": {"name": "NVIDIA H100", "type": "cuda"}},
        "clocks": {"decode": {"clocks.sm": "1980 MHz"}},
        "parts": parts,
        "rows": {f"{r['part']}/{i}": r for i, r in enumerate(rows)},
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [row("decode", 2**14), row("decode", 2**20), row("decode", 2**14, shape={"l0": 16})]
    (tmp_path / "gpu_check_h100.json").write_text(json.dumps(results(*rows)))
    return tmp_path


def test_a_row_says_time_rate_floor_contenders_memory_and_verdicts() -> None:
    assert report.cells(row("decode", 2**16)) == [
        *("decode", "65,536", "64", "uniform", "2.45 ms; fixed capacity 2.4 ms", "2311 GB/s"),
        *("91 %", "2.00x dense eager, torch.compile: does not fit", "3 MiB"),
        "met: 2 >= 1.2 x dense, **missed**: 0.03 <= 0.02 of memory",
    ]


def test_the_table_keeps_to_the_default_l0_and_names_the_machine(folder: Path) -> None:
    text = report.tables(folder)
    assert text.startswith("GPU: NVIDIA H100, SM clock 1980 MHz, commit abc, n = 8192, d = 5376.")
    assert text.count("| decode |") == 2
    assert "| decode | 1,048,576 | 64 |" in text


def test_rows_that_are_not_done_stay_out(tmp_path: Path) -> None:
    failed = row("decode", 2**14, status="failed", reason="ValueError: broken\nwhere")
    text = report.gpu_section(results(row("decode", 2**20), failed))
    assert text.count("| decode |") == 1
    assert "## Failed: decode, F=16384\n\n```\nValueError: broken" in report.summary(
        results(row("decode", 2**20), failed)
    )


@pytest.mark.parametrize("change", [{"quick": True}, {"device": {"name": "x", "type": "cpu"}}, {}])
def test_without_a_run_on_a_gpu_it_says_so(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "gpu_check_h100.json"
    if change:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.unlink()
    assert report.tables(folder) == report.NEVER
    assert "compile-tested and interpreted, never run on a device" in report.NEVER


def test_the_overview_counts_rows_and_targets() -> None:
    training = {"part": "train_1m", "name": "50 steps", "status": "done", "line": "50 steps of 1 s"}
    found = results(row("decode", 2**14), row("decode", 2**20), training)
    text = report.overview(found | {"unmeasured": ["one thing"]})
    assert "| decode | done | 2 done | 12 s |  |" in text
    assert "Targets: 2 of 4 met, 2 not measured. Also open:\n\n- one thing" in text
    assert "- 50 steps: 50 steps of 1 s" in report.gpu_section(found)
    assert "| 50 steps | done | 50 steps of 1 s |" in report.summary(found)


def benchmark(contender: str, median_s: float, **changes: Any) -> dict[str, Any]:
    told = {
        **{"op": "decode", "contender": contender, "peak_extra_bytes": 3 << 20},
        "shape": {"n": 1024, "d": 1152, "d_sae": 65536, "l0": 64, "inputs": "fp32, uniform"},
        **{"ratios": {"dense": 91.2}, "of_floor": 0.61, "tflops": None, "gb_per_s": 40.2},
        "targets": [{"text": "x dense", "goal": 90, "at_most": False, "found": 91.2, "met": True}],
    }
    return {"group": "one", "stats": {"median": median_s}, "extra_info": told | changes}


def test_the_cpus_table_has_one_row_per_case(tmp_path: Path) -> None:
    machine = {"processor": "AMD EPYC", "threads": 2, "instructions": "avx512", "torch": "2.13.0"}
    commit = {"id": "0123456789", "dirty": True}
    rows = [benchmark("dense", 0.9, targets=[]), benchmark("gemmascope_fast", 0.01)]
    rows += [benchmark("ours, direct", 0.02), benchmark("gemmascope_fast", 0.03) | {"group": "two"}]
    rows[-1]["extra_info"] |= {"tflops": 0.6712, "ratios": {}}
    found = {"machine_info": machine, "commit_info": commit, "benchmarks": rows}
    (tmp_path / "cpu_x.json").write_text(json.dumps(found))
    title, _, head, _, one, two = report.tables(tmp_path).split("\n\n", 1)[1].splitlines()
    assert title.startswith("CPU: AMD EPYC, 2 threads, avx512, torch 2.13.0, commit 0123456 and")
    assert head.startswith("| op | n | d | latents | inputs | time |")
    assert one == (
        "| decode | 1,024 | 1,152 | 65,536 | fp32, uniform | 10 ms; direct 20 ms | 40 GB/s | 61 % "
        "| 91.20x dense | 3 MiB | met: 91.2 >= 90 x dense |"
    )
    assert "| 30 ms | 671 GFLOP/s | 61 % |  | 3 MiB |" in two


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    before = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    after = report.replaced(before, "new")
    assert after == f"a\n{report.BEGIN}\nnew\n{report.END}\nb\n"
    assert report.replaced(after, "new") == after
    for wrong in ("no markers", f"{report.END}{report.BEGIN}", before + before):
        with pytest.raises(ValueError, match="once each"):
            report.replaced(wrong, "new")


def test_the_command_prints_plots_and_rewrites_the_readme(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    readme = folder / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\n{report.END}\n")
    options = ["--results", folder, "--out", folder / "plots", "--update-readme", readme]
    assert cli.main(["bench", "--report", *(str(o) for o in options)]) == 0
    printed = capsys.readouterr().out
    assert report.tables(folder) in printed and report.tables(folder) in readme.read_text()
    for name in ("nvidia_h100_speed.svg", "nvidia_h100_memory.svg"):
        assert str(folder / "plots" / name) in printed
        assert (folder / "plots" / name).read_text().startswith("<?xml")


def test_plots_show_every_contender_over_the_latents() -> None:
    found = results(row("decode", 2**20), row("decode", 2**14))
    assert report.series(found, "decode", "median_s") == {
        "gemmascope_fast": [(2**14, 0.00245), (2**20, 0.00245)],
        "ours, fixed capacity": [(2**14, 0.0024), (2**20, 0.0024)],
        "dense eager": [(2**14, 0.0049), (2**20, 0.0049)],
    }


def test_bench_alone_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    assert "--report" in capsys.readouterr().err
