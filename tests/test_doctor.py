"""The command line, and that `doctor` tells the truth about which code serves which op."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import cli, doctor, ops
from gemmascope_fast.doctor import machine, self_testing, serving

IMPLEMENTATIONS = {"native", "triton", "reference"}


def test_json_covers_the_table_and_passes() -> None:
    command = [sys.executable, "-m", "gemmascope_fast", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["gemmascope_fast"] == gsf.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["install"]["path"] == str(Path(gsf.__file__).parent)
    assert found["gpu"]["devices"] == [] or torch.cuda.is_available()
    assert found["advice"] == [a.to_json() for a in doctor.advise(found)]
    assert found["cpu"]["threads"] >= 1
    assert set(found["ops"]) == set(ops.TABLE)
    for name, devices in found["ops"].items():
        assert devices["cpu"]["implementation"] == ops.implementation(name, "cpu")
        assert devices["cpu"]["self_test"] == "pass"
        for row in devices.values():
            assert set(row["why_not"]) == IMPLEMENTATIONS - {row["implementation"]}


def test_text_names_op_implementation_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"gemmascope_fast {gsf.__version__}  torch {torch.__version__}" in text
    rows = {line.split()[0]: line.split()[1:3] for line in text.splitlines() if line}
    for name in ops.TABLE:
        assert rows[name] == [ops.implementation(name, "cpu"), "pass"]
    assert "not triton on cpu: Triton kernels need a GPU" in text.splitlines()
    assert "FAILED" not in text and "problem" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-1].startswith("ok: all 12 ops pass their self-test, served by native")


def test_a_forced_backend_is_the_reason(run_python: Callable[..., str]) -> None:
    code = "from gemmascope_fast import doctor as d; import json; print(json.dumps(d.report()))"
    found = json.loads(run_python(code, GEMMASCOPE_FAST_BACKEND="reference"))
    assert found["environment"] == {"GEMMASCOPE_FAST_BACKEND": "reference"}
    reason = "GEMMASCOPE_FAST_BACKEND=reference"
    for devices in found["ops"].values():
        assert devices["cpu"]["implementation"] == "reference"
        assert devices["cpu"]["why_not"] == {"native": reason, "triton": reason}


def wrong_value(op: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return op(*args) + 1

    return run


def wrong_gradient(op: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        values = args[2]
        return op(*args) + (values - values.detach()).sum()

    return run


def raising(op: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise RuntimeError("illegal instruction")

    return run


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (wrong_value, "tensor 0 of 4 differs from the reference"),
        (wrong_gradient, "tensor 1 of 4 differs from the reference"),
        (raising, "RuntimeError: illegal instruction"),
    ],
)
def test_a_wrong_op_fails_the_self_test(
    fault: Any, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ops.overload
    monkeypatch.setattr(
        ops, "overload", lambda name: fault(served(name)) if name == "decode" else served(name)
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"problem: FAILED decode on cpu: {text}" in out.splitlines()
    assert out.count("FAILED") == 1 and "ok:" not in out
    assert "report it with what `python -m gemmascope_fast doctor --json` prints" in out
    assert any(line.split()[:3:2] == ["decode", "FAIL"] for line in out.splitlines())


@pytest.mark.parametrize("name", ops.TABLE)
def test_every_op_is_compared_with_every_gradient(name: str) -> None:
    """The sample exercises the op: some output is not zero, and each parameter has a gradient."""
    tensors = self_testing._run(name, ops.overload(name), "cpu")
    assert any(bool(t.bool().any()) for t in tensors)
    gradients = {"decode": 3, "jumprelu_encode": 4, "topk_encode": 3, "batchtopk_encode": 3}
    outputs = len(ops.TABLE[name].schema.split("->")[1].split(","))
    assert len(tensors) == outputs + (gradients | {"pre_at": 3}).get(name, 0)
    for gradient in tensors[outputs:]:
        assert bool(gradient.bool().any())


def test_simd_target_follows_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"cpu_targets": ["generic", "avx2", "avx512", "avx2_vnni"]}
    monkeypatch.setattr(machine, "build_info", lambda: built)
    monkeypatch.delenv("GEMMASCOPE_FAST_CPU", raising=False)
    avx2 = {"avx2", "fma", "f16c", "sse"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert [machine.simd_target(f) for f in (set(), avx2, avx512)] == ["generic", "avx2", "avx512"]
    assert machine.simd_target(avx512 - {"avx512bw"}) == "avx2"
    assert machine.simd_target(avx2 | {"avx_vnni"}) == "avx2_vnni"
    assert machine.simd_target(avx512 | {"avx_vnni"}) == "avx512"
    amx = avx512 | {"avx512_vnni", "amx_tile", "amx_int8"}
    assert machine.simd_target(amx) == "avx512"
    built["cpu_targets"].append("avx512_amx")
    assert machine.simd_target(amx) == "avx512_amx"
    assert machine.simd_target(amx - {"amx_int8"}) == "avx512"
    built["cpu_targets"] = ["generic", "neon"]
    assert machine.simd_target({"fp", "asimd", "asimddp"}) == "neon"
    built["cpu_targets"] = ["generic"]
    assert machine.simd_target(avx512) == "generic"
    monkeypatch.setenv("GEMMASCOPE_FAST_CPU", "avx2")
    assert machine.simd_target(avx512) == "avx2"


def test_simd_target_is_the_one_the_kernels_choose() -> None:
    testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
    assert doctor.report()["cpu"]["simd_target"] == testing.simd_target_name(testing.simd_target())


def test_int8_is_what_the_kernels_say() -> None:
    if ops.NATIVE_MISSING:
        pytest.skip(ops.NATIVE_MISSING)
    gsf.topk_encode(torch.randn(2, 16), torch.randn(16, 8), torch.zeros(8), 1)
    assert doctor.report()["cpu"]["int8"] == gsf.explain().int8


def test_what_was_not_built_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "PACKAGE", tmp_path)
    monkeypatch.setattr(ops, "NATIVE_MISSING", "the compiled library is not built")
    monkeypatch.setattr(ops, "implementation", lambda name, device: "reference")
    assert machine.build_info() is None
    assert serving.why_not("decode", "cpu", "native") == "the compiled library is not built"
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "build: not built" in lines
    text = " ".join(" ".join(lines).split())
    assert f"problem: the package at {tmp_path} has no compiled library" in text
    assert not [line for line in lines if line.startswith("ok:")]
    assert "SIMD target" not in text and "code serves" not in text  # of a library that is absent


def test_cuda_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in serving.why_not("decode", "cuda", "native")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert serving.why_not("decode", "cuda", "reference") == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "implementation", lambda name, device: "reference")
    monkeypatch.setattr(ops, "NATIVE_MISSING", "")
    for archs, reason in ([], "was built without CUDA"), (["80"], "has no cuda implementation"):
        monkeypatch.setattr(machine, "build_info", lambda archs=archs: {"cuda_archs": archs})
        assert serving.why_not("decode", "cuda", "native") == f"the compiled library {reason}"
    for found, reason in (False, "triton is not installed"), (True, "native is faster"):
        monkeypatch.setattr(serving.triton_launchers, "FOUND", found)
        assert serving.why_not("decode", "cuda", "triton") == reason
    assert serving.why_not("decode", "cuda", "reference") == ""


# ---- the other commands


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in (["--version"], 0), ([], 2), (["doctor", "--fast"], 2), (["train"], 2):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == code, argv
    captured = capsys.readouterr()
    assert captured.out == f"gemmascope_fast {gsf.__version__}\n"
    assert "unrecognized arguments: --fast" in captured.err


@pytest.mark.parametrize("code", [0, 3])
def test_demo_gets_its_arguments(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmascope_fast import demo

    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "main", lambda argv: seen.append(argv) or code)
    assert cli.main(["demo", "--steps", "3", "--help", "x"]) == code
    assert seen == [["--steps", "3", "--help", "x"]]
