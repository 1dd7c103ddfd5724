"""What is shipped: an sdist that builds by itself, and its wheel in an environment of its own.

The wheel is built from the unpacked sdist, without CUDA, so whatever the build needs is in there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gemmascope_fast

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (2, 34)
"""Newest glibc that a wheel may need: RHEL 9, Debian 12 and Ubuntu 22.04 have it."""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def package_files() -> dict[str, bytes]:
    """Every file of the package as it is in the checkout, those of `kernels` included."""
    package = ROOT / "gemmascope_fast"
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for path in (Path(folder) / n for n in names if n.endswith((".py", ".json", ".typed"))):
            found[f"gemmascope_fast/{path.relative_to(package)}"] = path.read_bytes()
    found.pop("gemmascope_fast/_build_info.json", None)
    return found


# ---- the sdist


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code, cwd=ROOT).split()[-1]


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


def test_sdist_holds_the_sources_and_nothing_else(sdist: Path) -> None:
    members = tarfile.open(sdist).getmembers()
    names = {m.name.split("/", 1)[-1] for m in members if m.isfile()}
    metadata_of_it = {n for n in names if n.split("/")[0].endswith(".egg-info")}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    top = {"CMakeLists.txt", "MANIFEST.in", "setup.py", "setup.cfg", "pyproject.toml", "PKG-INFO"}
    read = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}
    assert names - metadata_of_it == package_files().keys() | sources | top | read
    assert not [m.name for m in members if m.issym() or m.islnk()]


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    env = {**os.environ, "GEMMASCOPE_FAST_CUDA": "0"}
    run(*pip, "-w", folder, unpacked, env=env, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_serves_every_python_from_3_11(wheel: Path) -> None:
    version = re.escape(gemmascope_fast.__version__)
    assert re.fullmatch(rf"gemmascope_fast-{version}-cp311-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_the_package_of_the_checkout_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {n for n in archive.namelist() if not n.split("/")[0].endswith(".dist-info")}
    expected = package_files()
    built = {"gemmascope_fast/_C.abi3.so", "gemmascope_fast/_build_info.json"}
    assert names == expected.keys() | built
    assert [n for n in expected if archive.read(n) != expected[n]] == []
    info = json.loads(archive.read("gemmascope_fast/_build_info.json"))
    assert info["version"] == gemmascope_fast.__version__ and info["cuda_archs"] == []


def test_wheel_describes_itself(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    (license_file,) = (n for n in archive.namelist() if n.endswith("/LICENSE"))
    assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    lines = archive.read(path).decode().splitlines()
    needs = {"torch>=2.11", "numpy>=1.26", "safetensors>=0.4"}
    found = {line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line}
    assert {f for f in found if "extra" not in f} == needs
    assert {"Requires-Python: >=3.11", "License-Expression: Apache-2.0"} <= set(lines)


def test_the_checkout_ships_the_same_modules(tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path, cwd=ROOT)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == package_files().keys()


def test_an_index_would_take_both(sdist: Path, wheel: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)


def test_only_the_stable_abi_of_python_is_used(wheel: Path) -> None:
    audit = [sys.executable, "-m", "abi3audit", "--strict", "--report", wheel]
    (found,) = json.loads(run(*audit))["specs"].values()
    (module,) = found["wheel"]
    assert module["name"] == "_C.abi3.so" and module["result"]["baseline"] == "3.11"
    assert module["result"]["is_abi3"] and module["result"]["is_abi3_baseline_compatible"]


def test_glibc_is_old_enough_and_torch_is_the_only_foreign_library(wheel: Path) -> None:
    told = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", wheel))
    needed = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", told["sym_tag"])
    assert needed and tuple(map(int, needed.groups())) <= GLIBC, told["sym_tag"]
    assert told["external_libs"] == {"libtorch_cpu.so": None}


# ---- an environment of its own


def requirements_of(name: str, found: set[str]) -> set[str]:
    """Names of the installed distributions that `name` needs, itself included."""
    if name in found or name == "triton":  # CUDA builds of torch ask for Triton; we do not
        return found
    found.add(name)
    for text in metadata.requires(name) or []:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            requirements_of(canonicalize_name(need.name), found)
    return found


def top_level(name: str) -> dict[str, Path]:
    """What a distribution has put into site-packages, and where that is."""
    found = metadata.distribution(name)
    first = {path.parts[0] for path in found.files or []} - {"..", "__pycache__"}
    return {entry: Path(str(found.locate_file(entry))) for entry in first}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, torch, numpy, safetensors and what those need."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, wheel, env={"PATH": os.environ["PATH"]}, cwd=folder)  # PYTHONPATH has a copy already
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    names: set[str] = set()
    for name in ("torch", "numpy", "safetensors"):
        requirements_of(name, names)
    for name in names:
        for entry, source in top_level(name).items():
            (site / entry).symlink_to(source)
    return python


def alone(python: Path, *arguments: str) -> str:
    """What that Python prints, in an empty folder and with neither a compiler nor our variables."""
    folder = python.parent.parent / "empty"
    folder.mkdir(exist_ok=True)
    environment = {"PATH": str(python.parent), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return run(python, *arguments, cwd=folder, env=environment)


def test_doctor_is_content_without_compiler_and_triton(installed: Path) -> None:
    found = json.loads(alone(installed, "-m", "gemmascope_fast", "doctor", "--json"))
    assert found["versions"]["triton"] == "absent"
    for name, devices in found["ops"].items():
        assert devices["cpu"]["implementation"] == "native", name
        assert devices["cpu"]["self_test"] == "pass", name


def test_an_encode_there_equals_the_reference(installed: Path) -> None:
    code = """
import sys
assert "gemmascope_fast" not in sys.modules
import torch, gemmascope_fast as gsf
assert "empty" not in gsf.__file__ and "site-packages" in gsf.__file__
x, b = torch.randint(-3, 4, (5, 40)).float(), torch.ones(64)
W = torch.randint(-3, 4, (64, 40)).float()
found = gsf.topk_encode(x, W.t(), b, 7)
assert gsf.explain().op == "topk_encode", gsf.explain()
truth = gsf.reference.topk_encode(x, W.t(), b, 7, False)
assert torch.equal(found.indices, truth[1]) and torch.equal(found.values, truth[2])
print(gsf.__version__, found.values.abs().sum() > 0)
"""
    assert alone(installed, "-c", code).split() == [gemmascope_fast.__version__, "tensor(True)"]
