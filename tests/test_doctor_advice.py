"""What `doctor` advises: every rule with its condition made and unmade, and the facts they read."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from gemmascope_fast import doctor
from gemmascope_fast.doctor import machine

PLAIN: dict[str, Any] = {
    "versions": {"gemmascope_fast": "1.0", "torch": "2.13.0", "python": "3.11", "triton": "3.6"},
    "install": {"path": "/site/gemmascope_fast", "checkout": False, "missing": "", "elsewhere": ""},
    "cpu": {
        "machine": "x86_64",
        "features": sorted(machine.SIMD_FLAGS["avx512"] | {machine.INT8_FLAGS["avx512"]}),
        "simd_target": "avx512",
        "simd_best": "avx512",
        "int8": True,
        "threads": 8,
        "cores": 8,
        "processors": 16,
    },
    "gpu": {"nvidia_driver": False, "torch_cuda": "", "torch_hip": "", "devices": []},
    "build": {"version": "1.0", "cuda_archs": ["80", "90a"], "cpu_targets": ["generic"]},
    "environment": {},
    "thread_settings": {},
    "ops": {"decode": {"cpu": {"implementation": "native", "self_test": "pass", "why_not": {}}}},
}
"""A report of which nothing follows."""

AVX2 = sorted(machine.SIMD_FLAGS["avx2"])
ARM = {
    "machine": "aarch64",
    "features": ["asimd", "asimddp"],
    "simd_target": "neon",
    "simd_best": "neon",
}
H100, A100 = ({"name": "GPU", "capability": c} for c in ("9.0", "8.0"))
NO_LIBRARY = {"missing": "the compiled library is not built"}
WITH_GPU = {"nvidia_driver": True, "torch_cuda": "13.0", "devices": [H100]}
FAILING = {"cpu": {"implementation": "native", "self_test": "wrong", "why_not": {}}}

ADVICE: dict[str, tuple[dict[str, Any], str, str]] = {
    # a change of the plain report, the level, and words of what follows
    "failed": ({"ops": {"decode": FAILING}}, "problem", "FAILED decode on cpu: wrong"),
    "not built": (
        {"install": NO_LIBRARY},
        "problem",
        "-> install a wheel of this platform, or `pip install --no-build-isolation .`",
    ),
    "not built here": (
        {"install": NO_LIBRARY | {"checkout": True}},
        "problem",
        "run `make build` here",
    ),
    "shadowed": (
        {"install": NO_LIBRARY | {"checkout": True, "elsewhere": "/site/gemmascope_fast"}},
        "problem",
        "leave this folder",
    ),
    "stale": ({"build": {"version": "0.9"}}, "problem", "is of version 0.9, the package of 1.0"),
    "backend": (
        {"environment": {"GEMMASCOPE_FAST_BACKEND": "reference"}},
        "slow",
        "GEMMASCOPE_FAST_BACKEND=reference keeps every op",
    ),
    "screen": (
        {"environment": {"GEMMASCOPE_FAST_SCREEN": "never"}},
        "slow",
        "GEMMASCOPE_FAST_SCREEN=never",
    ),
    "cpu": (
        {"environment": {"GEMMASCOPE_FAST_CPU": "avx2"}, "cpu": {"simd_target": "avx2"}},
        "slow",
        "GEMMASCOPE_FAST_CPU=avx2, where the avx512 code would run",
    ),
    "portable": ({"cpu": {"machine": "riscv64", "int8": False}}, "note", "no other for riscv64"),
    "neon without int8": (
        {"cpu": ARM | {"features": ["asimd"], "int8": False}},
        "note",
        "the processor lacks asimddp: without int8 dot products",
    ),
    "neon not built": (
        {"cpu": ARM | {"simd_target": "generic", "simd_best": "generic", "int8": False}},
        "note",
        "the generic code serves: no other was built",
    ),
    "avx2": (
        {"cpu": {"simd_target": "avx2", "simd_best": "avx2", "features": AVX2}},
        "note",
        "the avx2 code serves: the processor lacks avx512bw, avx512dq, avx512f, avx512vl",
    ),
    "int8": ({"cpu": {"int8": False}}, "note", "lacks avx512_vnni"),
    "few threads": (
        {"cpu": {"threads": 1}, "thread_settings": {"OMP_NUM_THREADS": "1"}},
        "slow",
        "torch uses 1 of 8 cores (OMP_NUM_THREADS=1)",
    ),
    "many threads": (
        {"cpu": {"threads": 64, "cores": 4, "processors": 4}},
        "note",
        "torch uses 64 threads, and this process may use 4 processors",
    ),
    "torch without CUDA": (
        {"gpu": {"nvidia_driver": True}},
        "slow",
        "an NVIDIA driver is here, but torch 2.13.0 is built without CUDA",
    ),
    "no device": (
        {"gpu": WITH_GPU | {"devices": []}},
        "slow",
        "an NVIDIA driver is here, but torch 2.13.0 finds no device",
    ),
    "built without CUDA": (
        {"gpu": WITH_GPU, "build": {"cuda_archs": []}},
        "slow",
        "built without CUDA, although a GPU is present: Triton's kernels serve there",
    ),
    "built without CUDA, no Triton": (
        {"gpu": WITH_GPU, "build": {"cuda_archs": []}, "versions": {"triton": "absent"}},
        "slow",
        "plain PyTorch serves there",
    ),
    "no code": (
        {"gpu": WITH_GPU, "build": {"cuda_archs": ["80-real", "120a-real"]}},
        "problem",
        "CUDAARCHS=90a",
    ),
    "older code": ({"gpu": WITH_GPU, "build": {"cuda_archs": ["80"]}}, "slow", "CUDAARCHS=90a"),
    "old GPU": (
        {"gpu": WITH_GPU | {"devices": [{"name": "GPU", "capability": "7.5"}]}},
        "note",
        "compute capability 7.5 is below 8.0",
    ),
    "torch": ({"versions": {"torch": "2.14.1+cpu"}}, "note", "torch 2.14.1+cpu is not among"),
}


def changed(change: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(PLAIN)
    for part, values in change.items():
        found[part] |= values
    return found | {"advice": [a.to_json() for a in doctor.advise(found)]}


def test_of_a_plain_report_nothing_follows() -> None:
    assert doctor.advise(PLAIN) == []
    assert changed({"cpu": ARM})["advice"] == []
    for gpus in [A100], [H100, A100], [{"name": "GPU", "capability": "8.6"}]:
        found = changed({"gpu": WITH_GPU | {"devices": gpus}})
        assert found["advice"] == [], gpus
    assert changed({"versions": {"torch": "2.11.0+cu130"}})["advice"] == []
    assert doctor.as_text(PLAIN | {"advice": []}).endswith("served by native; nothing to do")


@pytest.mark.parametrize("name", ADVICE)
def test_a_condition_has_its_advice_and_no_other(name: str) -> None:
    change, level, words = ADVICE[name]
    found = changed(change)
    (advice,) = found["advice"]
    text = doctor.as_text(found)
    assert advice["level"] == level and max(map(len, text.splitlines())) <= 100
    assert " ".join(words.split()) in " ".join(text.split())
    assert advice["do"] or level == "note"
    assert ("ok:" in text) == (level != "problem")


def test_a_forced_reference_is_no_problem_without_the_library() -> None:
    forced = {"GEMMASCOPE_FAST_BACKEND": "reference"}
    missing = {"missing": "GEMMASCOPE_FAST_BACKEND=reference"}
    (advice,) = changed({"environment": forced, "install": missing})["advice"]
    assert advice["level"] == "slow"


def test_a_library_behind_the_source_tree_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, dist = tmp_path / "gemmascope_fast", tmp_path / "gemmascope_fast-9.dist-info"
    package.mkdir()
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: gemmascope-fast\nVersion: 9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.install()["elsewhere"] != str(package)
    (package / "_C.abi3.so").touch()
    assert machine.install()["elsewhere"] == str(package)
    monkeypatch.setattr(machine, "PACKAGE", package)
    assert machine.install()["elsewhere"] != str(package)


CPUINFO = "".join(
    f"processor\t: {p}\nphysical id\t: 0\ncore id\t: {p % 4}\nflags\t\t: fma\n\n" for p in range(8)
)


def test_cores_count_siblings_once_and_obey_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name in machine.BINDING:
        monkeypatch.delenv(name, raising=False)
    allowed = set(range(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    assert machine._cores() == (8, 8)  # nothing known of cores
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert machine._cores() == (4, 8)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine._cores() == (4, 8)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert machine._cores() == (3, 3)
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine._cores() == (2, 2)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    allowed = {0, 4, 5}
    assert machine._cores() == (2, 3)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert machine._cores() == (0, 0)
