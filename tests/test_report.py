"""Tables of measurements: complete ones, verdicts, the README's part, charts' data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemmascope_fast import cli, report
from gemmascope_fast.report import charts, gemma, readme, tables
from gemmascope_fast.report.rows import Found, benchmarks, cpu_rows, read


def gpu_row(part: str, d_sae: int, **changes: Any) -> dict[str, Any]:
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
    rows = [gpu_row("decode", 2**14), gpu_row("decode", 2**20)]
    rows.append(gpu_row("decode", 2**14, shape={"l0": 16}))
    (tmp_path / "gpu_check_h100.json").write_text(json.dumps(results(*rows)))
    return tmp_path


def test_a_row_says_time_rate_floor_contenders_memory_and_verdicts() -> None:
    assert tables.cells(gpu_row("decode", 2**16) | {"op": "decode"}) == [
        *("decode", "65,536", "64", "uniform", "2.45 ms; fixed capacity 2.4 ms", "2311 GB/s"),
        *("91 %", "2.00x dense eager, torch.compile: does not fit", "3 MiB"),
        "met: 2 >= 1.2 x dense, **missed**: 0.03 <= 0.02 of memory",
    ]


def test_the_table_keeps_to_the_default_l0_and_names_the_machine(folder: Path) -> None:
    text = tables.tables(read([folder]))
    assert text.startswith("GPU: NVIDIA H100, SM clock 1980 MHz, commit abc, n = 8192, d = 5376.")
    assert text.count("| decode |") == 2
    assert "| decode | 1,048,576 | 64 |" in text


def test_rows_that_are_not_done_stay_out(tmp_path: Path) -> None:
    failed = gpu_row("decode", 2**14, status="failed", reason="ValueError: broken\nwhere")
    text = tables.gpu_section(results(gpu_row("decode", 2**20), failed) | {"about": "two runs"})
    assert "\n\ntwo runs\n\n" in text
    assert text.count("| decode |") == 1
    assert "## Failed: decode, F=16384\n\n```\nValueError: broken" in report.summary(
        results(gpu_row("decode", 2**20), failed)
    )


@pytest.mark.parametrize("change", [{"quick": True}, {"device": {"name": "x", "type": "cpu"}}, {}])
def test_without_a_run_on_a_gpu_it_says_so(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "gpu_check_h100.json"
    if change:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.unlink()
    assert tables.tables(read([folder])) == tables.NEVER
    assert "compile-tested and interpreted, never run on a device" in tables.NEVER


def test_the_overview_counts_rows_and_targets() -> None:
    training = {"part": "train_1m", "name": "50 steps", "status": "done", "line": "50 steps of 1 s"}
    found = results(gpu_row("decode", 2**14), gpu_row("decode", 2**20), training)
    text = report.overview(found | {"unmeasured": ["one thing"]})
    assert "| decode | done | 2 done | 12 s |  |" in text
    assert "Targets: 2 of 4 met, 2 not measured. Also open:\n\n- one thing" in text
    assert "- 50 steps: 50 steps of 1 s" in tables.gpu_section(found)
    assert "| 50 steps | done | 50 steps of 1 s |" in report.summary(found)


def benchmark(contender: str, median_s: float, **changes: Any) -> dict[str, Any]:
    told = {
        **{"op": "decode", "contender": contender, "peak_extra_bytes": 3 << 20},
        "shape": {"n": 1024, "d": 1152, "d_sae": 65536, "l0": 64, "inputs": "fp32, uniform"},
        **{"ratios": {"dense": 91.2}, "of_floor": 0.61, "tflops": None, "gb_per_s": 40.2},
        "targets": [{"text": "x dense", "goal": 90, "at_most": False, "found": 91.2, "met": True}],
    }
    return {"group": "one", "stats": {"median": median_s}, "extra_info": told | changes}


def cpu_results(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    machine = {"processor": "AMD EPYC", "threads": 2, "instructions": "avx512", "torch": "2.13.0"}
    commit = {"id": "0123456789", "dirty": True}
    found = {"machine_info": machine, "commit_info": commit, "benchmarks": list(rows)}
    return found | {"command": "bench decode"} | changes


def test_the_cpus_table_has_one_row_per_case(tmp_path: Path) -> None:
    rows = [benchmark("dense", 0.9, targets=[]), benchmark("gemmascope_fast", 0.01)]
    rows += [benchmark("ours, direct", 0.02), benchmark("gemmascope_fast", 0.03) | {"group": "two"}]
    rows[-1]["extra_info"] |= {"tflops": 0.6712, "ratios": {}, "facts": {"touched": 41276.0}}
    (tmp_path / "cpu_x.json").write_text(json.dumps(cpu_results(*rows)))
    text = tables.tables(read([tmp_path]))
    title, _, head, _, one, two = text.split("\n\n", 1)[1].splitlines()
    assert title.startswith("CPU: AMD EPYC, 2 threads, avx512, torch 2.13.0, commit 0123456 and")
    assert title.endswith("From [cpu_x.json](../bench/results/cpu_x.json), by `bench decode`.")
    assert head.startswith("| op | n | d | latents | L0 | inputs | time |")
    assert one == (
        "| decode | 1,024 | 1,152 | 65,536 | 64 | fp32, uniform | 10 ms; direct 20 ms | 40 GB/s "
        "| 61 % | 91.20x dense | 3 MiB | met: 91.2 >= 90 x dense |"
    )
    assert "| fp32, uniform, 41,276 touched | 30 ms | 671 GFLOP/s | 61 % |  | 3 MiB |" in two


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {}}]}']
)
def test_a_file_without_our_measurements_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match="bench: .*cpu.json (is not|holds no|has benchmarks)"):
        benchmarks(tmp_path / "cpu.json")


# ---- the README's part


def found_results() -> Found:
    missed = [{"text": "x dense", "goal": 90, "at_most": False, "found": 78.04, "met": False}]
    other = benchmark("gemmascope_fast", 0.02, targets=missed) | {"group": "two"}
    other["extra_info"]["shape"] = {**other["extra_info"]["shape"], "inputs": "fp32, log-normal"}
    rows = [benchmark("dense", 0.9, targets=[]), benchmark("gemmascope_fast", 0.01), other]
    gpu = results(gpu_row("decode", 2**16), gpu_row("decode", 2**20))
    return Found({"gpu_check_h100.json": gpu}, {"cpu_decode.json": cpu_results(*rows)})


def test_the_readme_shows_chosen_rows_with_sizes_contenders_and_verdicts() -> None:
    text = readme.part(found_results())
    assert "| decode | 1,024 | 1,152 (1B) | 65,536 | 10 ms | 91.2x dense | 3 MiB (3 MiB)" in text
    assert "| decode | 8,192 | 5,376 (27B) | 65,536 | 2.45 ms | 2x dense eager | 3 MiB (300" in text
    assert "[cpu_decode.json](bench/results/cpu_decode.json) (commit 0123456 and changes)" in text
    assert "by `make gpu-check`" in text and "| 1 of 2 met, **1 missed** |" in text


def test_the_step_of_a_gpu_is_shown_as_it_is_timed_with_and_without_its_update() -> None:
    ours, theirs = "ours, with Adam(fused=True)", "dense eager, with fused torch Adam"
    row = gpu_row("step", 2**16)
    row["times"] |= {ours: {"median_s": 0.0049}, theirs: {"median_s": 0.0245}}
    row["ratios"] |= {ours: 2.0, theirs: 10.0}
    text = readme.part(Found({"gpu_check_h100.json": results(row)}, {}))
    assert (
        "| forward and backward | 8,192 | 5,376 (27B) | 65,536 | 2.45 ms | 2x dense eager |" in text
    )
    (plain,) = [line for line in text.splitlines() if line.startswith("| forward and backward")]
    assert plain.endswith("|  |"), "the targets of a step are of the one with its update"
    assert (
        f"| training step with Adam | 8,192 | 5,376 (27B) | 65,536 | 4.9 ms | 5x {theirs} |" in text
    )


def test_every_missed_target_is_told_whether_its_row_is_shown_or_not() -> None:
    text = readme.part(found_results())
    assert "3 of 6 targets are met ([every row](docs/benchmarks.md)). Missed:" in text
    assert "| CPU | decode | >= 90 x dense | 1 of 2 | 78 (fp32 log-normal) |" in text
    assert "| GPU | decode | <= 0.02 of memory | 0 of 2 | 0.03 (65,536 latents); 0.03 (1," in text


def test_without_a_miss_nothing_is_listed() -> None:
    text = readme.missed(cpu_rows(cpu_results(benchmark("gemmascope_fast", 0.01))))
    assert text == "1 of 1 targets are met ([every row](docs/benchmarks.md))."


def test_widths_are_named_after_gemma_3() -> None:
    assert [gemma.model(d) for d in (640, 1152, 4096, 768)] == ["270M", "1B", "12B, 27B", ""]
    assert gemma.places([1152, 2048, 768, 1152]) == (
        "1,152 is 1B (resid_post, mlp_out, transcoders); 2,048 is 4B (attn_out)"
    )


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    before = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    after = readme.replaced(before, "new")
    assert after == f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb\n"
    assert readme.replaced(after, "new") == after
    for wrong in ("no markers", f"{readme.END}{readme.BEGIN}", before + before):
        with pytest.raises(ValueError, match="once each"):
            readme.replaced(wrong, "new")


def test_the_command_prints_tables_and_rewrites_readme_and_document(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = folder / "README.md"
    page.write_text(f"# Title\n{readme.BEGIN}\n{readme.END}\n")
    assert cli.main(["bench", "--results", str(folder), "--update-readme", str(page)]) == 0
    found = read([folder])
    printed = capsys.readouterr().out
    assert tables.tables(found) in printed and str(folder / "docs" / "benchmarks.md") in printed
    assert readme.part(found) in page.read_text()
    assert (folder / "docs" / "benchmarks.md").read_text() == tables.document(found)


# ---- what charts show


def test_a_curve_has_every_contender_over_the_sizes_that_differ_in_one_thing_alone() -> None:
    rows = [{**gpu_row("decode", d_sae), "op": "decode"} for d_sae in (2**20, 2**14, 2**16)]
    rows.append({**gpu_row("decode", 2**18, shape={"l0": 16}), "op": "decode"})
    drawn = charts.curves(rows, "d_sae")
    assert list(drawn) == ["decode: n 8,192, d 5,376, l0 64, uniform"]
    assert charts.curves(rows[:2], "d_sae") == {}, "two points are no curve"
    (held,) = drawn.values()
    sizes = (2**14, 2**16, 2**20)
    assert charts.points(held, "d_sae", "peak_extra_bytes") == {
        "gemmascope_fast": [(x, 3 << 20) for x in sizes],
        "ours, fixed capacity": [(x, 3 << 20) for x in sizes],
        "dense eager": [(x, 300 << 20) for x in sizes],
    }


def test_dense_overtakes_where_the_curves_cross() -> None:
    dense = [(16, 8.0), (64, 8.0), (256, 8.0)]
    assert charts.crossover([(16, 2.0), (64, 4.0), (256, 16.0)], dense) == pytest.approx(128)
    assert charts.crossover([(16, 2.0), (64, 4.0), (256, 7.0)], dense) == float("inf")
    assert charts.crossover([(16, 9.0), (64, 10.0), (256, 16.0)], dense) == 0
