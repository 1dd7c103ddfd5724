"""What is built and shipped: wheel and sdist contents, stable symbols, a harmless import."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import gemmascope_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(gemmascope_fast.__file__).parent
LIBRARY = PACKAGE / "_C.abi3.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the library is not built")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code, **env):
    return run(sys.executable, "-c", code, env={**os.environ, **env}).strip()


def build_info():
    return json.loads((PACKAGE / "_build_info.json").read_text())


def modules(package):
    """Every module of the package, those behind the `kernels` symlink included."""
    found = set()
    for folder, _, files in os.walk(package, followlinks=True):
        inside = Path("gemmascope_fast") / Path(folder).relative_to(package)
        found |= {str(inside / f) for f in files if f.endswith(".py")}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for stale in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(stale)
    archs = build_info()["cuda_archs"]  # the same as in place, so that nothing is compiled again
    env = {**os.environ, "CUDAARCHS": ";".join(archs)}
    if not archs:
        env["GEMMASCOPE_FAST_CUDA"] = "0"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run(*pip, "--no-index", "-w", str(folder), str(ROOT), env=env)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_serves_every_python_from_3_11(wheel):
    assert re.fullmatch(r"gemmascope_fast-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n.split("/")[0].split("-")[0] for n in names} == {"gemmascope_fast"}
    assert {n for n in names if n.endswith(".py")} == modules(ROOT / "gemmascope_fast")
    binaries = {n for n in names if n.endswith(".so")}
    assert binaries == {"gemmascope_fast/_C.abi3.so"}
    assert "gemmascope_fast/_build_info.json" in names


def test_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import gemmascope_fast as g; from gemmascope_fast import _C; print(g.__file__, _C)"
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.count(str(tmp_path)) == 2


def test_sdist_follows_the_kernels_symlink(tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    archive = tmp_path / run(sys.executable, "-c", code, cwd=ROOT).split()[-1]
    members = tarfile.open(archive).getmembers()
    names = {m.name.split("/", 1)[-1] for m in members if m.isfile()}
    assert modules(ROOT / "gemmascope_fast") <= names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [m.name for m in members if m.issym() or m.name.split("/")[1:2] == ["kernels"]]


def test_kernels_is_a_relative_symlink():
    assert os.readlink(ROOT / "gemmascope_fast" / "kernels") == "../kernels"


def test_versions_agree():
    assert build_info()["version"] == gemmascope_fast.__version__ == version("gemmascope-fast")


def test_only_stable_symbols_are_imported():
    # libc, libm, libstdc++ and libgcc version their symbols; torch does not. What is left must be
    # the C shim of the stable ABI and the one function of CPython that an empty module calls.
    lines = run("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()
    symbols = [line.split()[-1] for line in lines if line.split()[0] == "U"]
    unversioned = [s for s in symbols if "@" not in s]
    stable = re.compile(r"aoti_torch_\w+|torch_\w+|PyModuleDef_Init")
    assert [s for s in unversioned if not stable.fullmatch(s)] == []
    assert "PyModuleDef_Init" in unversioned


def test_no_cuda_library_is_needed():
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", run("readelf", "-d", str(LIBRARY))))
    loader = {name for name in needed if name.startswith("ld-linux")}
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt"}
    assert needed - loader <= system | {"libtorch_cpu"}


def test_simd_objects_share_no_code():
    # A weak (COMDAT) function compiled for AVX-512 could replace the generic one in the link.
    built = sorted(ROOT.glob(f"build/{sys.implementation.cache_tag}/CMakeFiles/gsf_simd_*"))
    if not built:
        pytest.skip("not built in this tree")
    for source in (ROOT / "csrc" / "cpu" / "simd").glob("*.cpp"):
        for folder in built:
            obj = folder / f"{source.relative_to(ROOT)}.o"
            lines = run("nm", "--defined-only", str(obj)).splitlines() if obj.exists() else []
            assert [s for s in lines if s.split()[1] in "WwVvu"] == [], obj


def test_import_does_not_flush_subnormals():
    code = "import gemmascope_fast, gemmascope_fast._C; print(float('1e-323') != 0.0)"
    assert python(code) == "True"


def test_import_does_not_touch_a_gpu_or_print():
    code = "import gemmascope_fast, torch; assert not torch.cuda.is_initialized()"
    assert python(code) == ""
    assert python(code, CUDA_VISIBLE_DEVICES="") == ""


def test_library_imports_before_the_package():
    code = "import torch, gemmascope_fast._C as c; print(c.__name__)"
    assert python(code) == "gemmascope_fast._C"


def test_every_requested_architecture_is_in_the_library():
    archs = build_info()["cuda_archs"]
    if not archs:
        pytest.skip("built without CUDA")
    site = Path(sysconfig.get_path("purelib"))
    found = [shutil.which("cuobjdump"), *site.glob("nvidia/*/bin/cuobjdump")]
    cuobjdump = next((str(path) for path in found if path), None)
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    listed = run(cuobjdump, "--list-elf", str(LIBRARY))
    found = set(re.findall(r"\.sm_(\w+)\.", listed))
    assert found == {a.removesuffix("-real") for a in archs if not a.endswith("-virtual")}
