"""`bench/gpu_check.py`: resuming, limits, other tools' results, a whole run on toy sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmascope_fast import ops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu import machine, sparsify_files, suite, supervise  # noqa: E402
from gpu.context import Context, Fatal, Settings, Skip  # noqa: E402
from gpu.state import ATTEMPTS, Results  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def context(path: Path, limit_s: float = 100.0) -> Context:
    return Context("decode", Settings("cpu", quick=True), Results(path), limit_s)


def fail(error: BaseException) -> Any:
    raise error


# ---- resuming


def test_rows_are_on_disk_at_once_and_measured_once(path: Path) -> None:
    calls = []
    for _ in range(2):  # the second run finds the first one's file
        context(path).row("a", lambda: calls.append(1) or {"found": float("nan")})
        row = json.loads(path.read_text())["rows"]["decode/a"]
        assert (row["status"], row["found"], row["attempts"]) == ("done", "nan", 1)
    assert calls == [1]
    assert not path.with_suffix(".new").exists()


def test_what_failed_is_tried_again_but_not_for_ever(path: Path) -> None:
    calls = []
    for _ in range(ATTEMPTS + 2):
        context(path).row("a", lambda: calls.append(1) or fail(ValueError("broken")))
    row = Results(path).data["rows"]["decode/a"]
    assert len(calls) == ATTEMPTS
    assert row["status"] == "failed" and row["reason"].startswith("ValueError: broken")
    assert "test_gpu_check.py" in row["reason"], "says where"


def test_a_skip_carries_its_reason_and_leaves_the_part_done(path: Path) -> None:
    ctx = context(path)
    ctx.row("a", lambda: fail(Skip("no such tool")))
    assert Results(path).data["rows"]["decode/a"]["reason"] == "no such tool"
    assert ctx.results.verdict("decode") == "done"


def test_a_row_too_long_for_the_rest_of_the_part_is_postponed_and_comes_back(path: Path) -> None:
    ctx = context(path, limit_s=10)
    ctx.row("a", lambda: {}, 60)
    row = Results(path).data["rows"]["decode/a"]
    assert row["status"] == "postponed" and row["reason"].startswith("about 60 s needed, 1")
    assert ctx.results.verdict("decode") == "incomplete"
    context(path).row("a", lambda: {}, 60)
    assert Results(path).data["rows"]["decode/a"]["status"] == "done"


def test_a_broken_device_ends_the_part(path: Path) -> None:
    with pytest.raises(Fatal):
        context(path).row("a", lambda: fail(Fatal("gone")))
    assert Results(path).data["rows"]["decode/a"]["status"] == "failed"


def test_forgetting_a_part_leaves_the_others(path: Path) -> None:
    results = Results(path)
    for part in ("encode", "decode"):
        results.put(part, "a", "done")
        results.end_part(part, status="done", reason="")
    results.forget("encode")
    again = Results(path)
    assert [*again.data["rows"]] == ["decode/a"] and [*again.data["parts"]] == ["decode"]


def test_a_file_of_another_schema_is_refused(path: Path) -> None:
    path.write_text('{"schema": 0}')
    with pytest.raises(SystemExit, match="schema 0, expected 1"):
        Results(path)


# ---- parts as processes


def part_program(path: Path, code: str) -> supervise.Start:
    """A part that writes one finished row, begins another, and then does `code`."""
    text = f"""
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "bench")!r})
from gpu.state import Results
results = Results(Path({str(path)!r}))
results.put("decode", "first", "done")
results.begin("decode", "second")
print("working", flush=True)
{code}
"""
    return lambda part, limit_s: [sys.executable, "-c", text]


def test_a_part_that_hangs_is_stopped_and_its_row_named(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 1.0)
    child = path.with_name("child")
    code = (
        "subprocess.Popen([sys.executable, '-c', "
        f"\"import time; time.sleep(4); open({str(child)!r}, 'w')\"])\ntime.sleep(60)"
    )
    began = time.monotonic()
    status = supervise.run_part("decode", path, True, part_program(path, code), limit_s=1.0)
    assert status == "incomplete" and time.monotonic() - began < 20
    data = Results(path).data
    assert data["parts"]["decode"]["reason"] == "stopped after 2 s"
    assert data["rows"]["decode/first"]["status"] == "done"
    assert data["rows"]["decode/second"]["status"] == "failed"
    time.sleep(4)
    assert not child.exists(), "a child outlived its part"


def test_a_part_that_crashes_says_how(path: Path) -> None:
    status = supervise.run_part("decode", path, True, part_program(path, "sys.exit('oh no')"))
    entry = Results(path).data["parts"]["decode"]
    assert status == entry["status"] == "failed"
    assert entry["reason"] == "exit status 1: working | oh no"


def test_a_part_is_done_when_its_rows_are(path: Path) -> None:
    code = "results.put('decode', 'second', 'skipped')"
    assert supervise.run_part("decode", path, True, part_program(path, code)) == "done"
    assert Results(path).part_done("decode")


# ---- other people's tools


def test_results_of_pytest_are_read() -> None:
    text = "SKIPPED [2] tests/a.py:3: no reason\n=== 5 passed, 2 skipped in 3.10s ===\n"
    assert suite.outcome(0, text, 9)["counts"] == {"passed": 5, "skipped": 2}
    assert suite.outcome(0, text, 9)["skips"] == ["tests/a.py:3: no reason"]
    failed = suite.outcome(1, "E  boom\n1 failed, 4 passed in 2s", 9)
    assert failed["status"] == "failed" and "E  boom" in failed["reason"]
    assert "longer than 9 s" in suite.outcome(None, "", 9)["reason"]
    with pytest.raises(Skip, match="no test"):
        suite.outcome(suite.NO_TESTS, "", 9)


def test_modules_whose_imports_are_missing_are_not_collected(monkeypatch: Any) -> None:
    names = {p.name for p in suite.device_modules(ROOT / "tests")}
    assert {"test_decode.py", "test_properties.py"} <= names and "test_gpu_check.py" not in names
    assert {"test_triton_decode.py", "test_triton_select.py"} <= names, "without the fixture"
    own = {p.name for p in (ROOT / "tests").glob("test_*_device.py")}
    assert (
        own - names == {"test_gpu_check_device.py"} and "test_batchtopk_screened_device.py" in own
    )
    find = lambda name: None if name == "hypothesis" else object()  # noqa: E731
    monkeypatch.setattr(suite.importlib.util, "find_spec", find)
    assert suite.missing_imports(ROOT / "tests" / "test_properties.py") == ["hypothesis"]
    ctx: Any = None  # not reached
    with pytest.raises(Skip, match="not collected: hypothesis not installed"):
        suite._module(ctx, ROOT / "tests" / "test_properties.py")


def test_results_of_the_sanitizer_are_read() -> None:
    clean = "done: decode torch.float32 (triton), 2 calls\n========= ERROR SUMMARY: 0 errors\n"
    found = suite.sanitized(0, clean, 9)
    assert found["line"] == "ERROR SUMMARY: 0 errors" and "status" not in found
    blame = (
        "========= Invalid __global__ read of size 4 bytes\n"
        "=========     at _decode_kernel+0x1230 in decode.py:40\n"
        "=========     at 0x70 in _other_kernel\n========= ERROR SUMMARY: 2 errors\n"
    )
    found = suite.sanitized(86, blame, 9)
    assert found["status"] == "failed"
    assert found["blamed"] == ["_decode_kernel", "_other_kernel"]
    assert suite.sanitized(0, "nothing", 9)["status"] == "failed"
    assert "after 1 calls" in suite.sanitized(None, clean, 9)["reason"]


def test_a_build_says_what_it_lacks() -> None:
    have = {"g++", "cmake", "ninja", "setuptools"}
    absent = machine.missing_for_build(have.__contains__, have.__contains__)
    assert absent == ["nvcc", "Python package pybind11"]
    assert machine.slug("cpu") == "cpu"


def test_what_the_sanitizer_watches_runs_every_op() -> None:
    script = ROOT / "bench" / "gpu" / "sanitized.py"
    done = subprocess.run([sys.executable, script, "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = suite.sanitized(0, done.stdout, 9)["calls"]
    assert len(calls) == 4 * (len(ops.TABLE) + 1), "two sizes of two dtypes, and on codes"
    assert sum("130 tokens" in call for call in calls) == len(calls) / 2


# ---- all of it


def gpu_check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench" / "gpu_check.py", "--device", "cpu", "--quick"]
    command += ["--out", out, *options]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True)


def test_the_program_runs_parts_and_resumes(tmp_path: Path) -> None:
    first = gpu_check(tmp_path, "--parts", "sanitizer,build,decode", "--commit", "abc")
    assert first.returncode == 0, first.stdout + first.stderr
    begun = re.findall(r"^== (\w+)$", first.stdout, flags=re.M)
    assert begun == ["environment", "sanitizer", "build", "decode"], "as they were named"
    data = json.loads((tmp_path / "gpu_check_cpu_quick.json").read_text())
    assert {k: v["status"] for k, v in data["parts"].items()} == dict.fromkeys(
        ("environment", "build", "sanitizer", "decode"), "done"
    )
    assert data["device"]["type"] == "cpu" and data["parts"]["decode"]["commit"] == "abc"
    assert (tmp_path / "gpu_check_cpu_quick.md").read_text().count("| decode |") >= 4
    second = gpu_check(tmp_path, "--parts", "decode")
    assert "decode: done before" in second.stdout
    unknown = gpu_check(tmp_path, "--parts", "decode,nonsense")
    assert unknown.returncode == 2 and "unknown parts: nonsense" in unknown.stderr


@pytest.mark.parametrize(
    "part", [p for p in supervise.PARTS if p not in ("environment", "build", "tests", "sanitizer")]
)
def test_every_measuring_part_runs_on_toy_sizes(part: str, path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        supervise.work(part, Settings("cpu", quick=True), path, 100)
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
    found = Results(path).rows(part)
    assert found and {r["status"] for r in found} <= {"done", "skipped"}, found
    for r in found:
        lacking = ("streams and graphs are a GPU's", sparsify_files.ABSENT)
        assert r["status"] == "done" or r["reason"] in lacking
        if "ratios" in r:
            alone = "the library is built without CUDA" in r["line"]
            assert (r["ratios"] or alone) and r["error"] < 0.01 and r["line"]


def test_lists_of_tensors_move_too() -> None:
    from gpu.sanitized import moved_to

    state = [torch.ones(3), torch.ones(2, 3).t()]
    moved = moved_to(state, "meta")
    assert [t.device.type for t in moved] == ["meta"] * 2
    assert [t.stride() for t in moved] == [(1,), (1, 3)]
    assert moved_to([1, 0.5], "meta") == [1, 0.5]
