"""`python -m gemmascope_fast bench`: options, what it says where it cannot run, its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemmascope_fast import cli
from gemmascope_fast.report import readme, running, terminal
from gemmascope_fast.report.rows import CHECKOUT, OURS, RESULTS, read


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["decoder"],
            "no suite 'decoder': choose from encode, decode, backward, step, layers, small, ",
        ),
        (["--against", "compile,jax"], "--against: 'jax' is none of compile, saelens, sparsify"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--sweep", "decode"], "--sweep is a suite of its own"),
        (["--quick", "--sweep"], "not allowed with"),
    ],
)
def test_wrong_options_are_told(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_an_installed_package_says_where_the_suites_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "BENCH", tmp_path / "bench")
    assert cli.main(["bench", "--quick"]) == 2
    assert "part of the source checkout, not of the installed package" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lacking, message",
    [
        ("pytest_benchmark", "pytest-benchmark not installed: pip install pytest-benchmark"),
        (
            "gemmascope_fast._testing",
            "the compiled library is missing in this checkout: make build",
        ),
    ],
)
def test_what_is_missing_is_told_with_its_remedy(
    lacking: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = running.importlib.util.find_spec
    monkeypatch.setattr(
        running.importlib.util, "find_spec", lambda name: None if name == lacking else find(name)
    )
    assert cli.main(["bench"]) == 2
    assert message in capsys.readouterr().err


def test_peers_that_are_not_installed_are_all_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "PEERS", {"saelens": "no_such_module", "sparsify": "nor_this"})
    monkeypatch.setattr(running, "PEERS_PYTHON", tmp_path / "python")
    monkeypatch.setattr(running, "follow", lambda *_: pytest.fail("a suite was started"))
    assert cli.main(["bench", "decode", "--against", "saelens,sparsify,compile"]) == 2
    told = capsys.readouterr().err
    assert "saelens and sparsify cannot take part, because no_such_module and nor_this" in told
    assert "make .venv-peers/.installed" in told
    assert cli.main(["bench", "saelens"]) == 2
    assert "bench: saelens cannot take part, because no_such_module can" in capsys.readouterr().err


def test_nothing_that_matches_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "decode", "--shapes", "toy", "-k", "nothing"]) == 1
    assert "no case of decode matches -k 'nothing'" in capsys.readouterr().err


def test_a_peer_alone_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sparsify's rows come from another program; a file of results holds benchmarks."""

    def follow(command: list[str], *_: Any) -> list[str]:
        if "--json" in command:
            Path(command[-1]).write_text("{}")
        return []

    monkeypatch.setattr(running, "follow", follow)
    monkeypatch.setattr(running, "interpreters", lambda peers: dict.fromkeys(peers, "python"))
    arguments = ["decode", "--against", "sparsify", "-k", "nothing"]
    assert cli.main(["bench", *arguments, "--out", str(tmp_path / "a.json")]) == 1
    assert "no case of decode matches -k 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_calls_of_other_libraries_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich.console", reason="needs rich: pip install rich")
    row = {"stock": {"median_ms": 256.4}, "backend": {"median_ms": 106.0}}
    told = read([RESULTS]).cpu["cpu_step.json"] | {
        "integrations": {"sparsify": {"rows": {"step": row}}}
    }
    terminal.print_results(rich.Console(width=80), told)
    assert "sparsify, step: 256 ms, on this backend 106 ms (2.4x)" in capsys.readouterr().out


def test_every_set_of_sizes_of_the_command_has_cases() -> None:
    """By the suites' own lists; `quick` must stay small and at Gemma's widths."""
    import sys

    sys.path.insert(0, str(CHECKOUT / "bench"))
    suites = {name: __import__(f"bench_{name}") for name in (*running.SUITES, running.SWEEP)}
    for shapes in ("quick", "small", "named"):
        assert all(suites[name].specs(shapes) for name in running.SUITES), shapes
        assert suites["sweep"].specs(shapes) == []
    assert len(suites["sweep"].specs("sweep")) == 23
    assert sum(len(suites[name].specs("quick")) for name in running.SUITES) <= 14


def test_the_quick_table_names_models_and_explains_its_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rich = pytest.importorskip("rich.console", reason="needs rich: pip install rich")
    terminal.print_results(rich.Console(width=80), read([RESULTS]).cpu["cpu_step.json"])
    printed = capsys.readouterr().out
    row = next(text for text in printed.splitlines() if text.startswith("training step"))
    assert "1B (d 1,152)" in row and "65,536 (64)" in row and " 28 / 1,957 " in row
    assert "…" not in printed
    for title, _ in terminal.LEGEND:
        assert f"  {title:9}" in printed
    told = " ".join(printed.split())
    assert "1,152 is 1B (resid_post, mlp_out, transcoders)" in told and "Your row:" in told


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(terminal.os, "getloadavg", lambda: (1.9, 0.0, 0.0))
    assert terminal.busy() == ""
    monkeypatch.setattr(terminal.os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    assert "load 2.0 on 4 processors" in terminal.busy()


# ---- the page


def rows_of(shapes: list[tuple[int, int]], **more: Any) -> dict[str, Any]:
    """Steps of these `(d_sae, l0)`, ours and dense, with parts and ceilings."""
    parts = {"encode": 0.3, "decode and loss": 0.1, "backward": 0.2, "optimizer": 0.4}
    found = []
    for d_sae, l0 in shapes:
        for name, seconds in ((OURS, 1e-6 * l0 * 64), ("dense fp32", 1e-6 * d_sae)):
            told = {"op": "step", "contender": name, "peak_extra_bytes": 1 << 24, "targets": []}
            told |= {"shape": {"n": 512, "d": 1152, "d_sae": d_sae, "l0": l0, "inputs": "fp32"}}
            told |= {"stages": {part: share * seconds for part, share in parts.items()}}
            told |= {"cost": {"flops": 10**9, "bytes": 10**8}, "facts": {}, "of_floor": 0.5}
            told |= {"rates": {"copy": 3e10, "int8 tile": 9e11}, "tflops": 0.1, "gb_per_s": None}
            told |= {"ratios": {"dense fp32": 2.0} if name == OURS else {}}
            stats = {"median": seconds, "data": [seconds]}
            found.append({"group": f"{d_sae}-{l0}", "stats": stats, "extra_info": {**told, **more}})
    info = {"processor": "<AMD>", "threads": 2, "instructions": "avx512", "torch": "2.13"}
    commit = {"id": "0" * 40, "dirty": False}
    return {"machine_info": info, "commit_info": commit, "benchmarks": found, "command": "bench"}


def page_of(tmp_path: Path, results: dict[str, Any]) -> str:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    (tmp_path / "cpu_x.json").write_text(json.dumps(results))
    options = ["--results", str(tmp_path / "cpu_x.json"), "--report", str(tmp_path / "out")]
    assert cli.main(["bench", *options]) == 0
    return (tmp_path / "out" / "report.html").read_text()


def test_the_page_is_one_file_with_every_plot(tmp_path: Path) -> None:
    shapes = [(d_sae, 64) for d_sae in (4096, 16_384, 65_536)]
    shapes += [(16_384, l0) for l0 in (16, 512, 1024)]
    text = page_of(tmp_path, rows_of(shapes))
    assert text.count("<svg") == 4 and "Not drawn" not in text
    for word in ("http://", "https://", "<script", "<link", "src="):
        assert word not in text.replace("http://www.w3.org", ""), "only names of SVG's namespaces"
    assert "int8 tile 900 G/s" in text and "copy 30 GB/s" in text
    assert "dense fp32 is faster from L0 = 256" in text  # 64 us an entry, 16,384 us in all
    assert "optimizer" in text and "&lt;AMD&gt;" in text and "1,152 is 1B" in text
    assert text == page_of(tmp_path, rows_of(shapes)), "the same results give the same page"


def test_the_page_says_what_it_cannot_draw(tmp_path: Path) -> None:
    text = page_of(tmp_path, rows_of([(4096, 64)], stages={}, cost={}))
    assert text.count("Not drawn.") == 4 and "<svg" not in text
    for lacking in ("costs and ceilings", "differ in d_sae", "differ in l0", "time their parts"):
        assert lacking in text


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    found = read([RESULTS])
    assert readme.part(found) in (CHECKOUT / "README.md").read_text(), "bench --update-readme"
    assert readme.document(found) == (CHECKOUT / readme.COMPLETE).read_text()
