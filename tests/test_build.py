"""What is built: stable symbols, a harmless import, one version. (What ships: test_wheel.py.)"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
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


def test_kernels_is_a_relative_symlink():
    assert os.readlink(ROOT / "gemmascope_fast" / "kernels") == "../kernels"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited and newest and build_info()["version"] == gemmascope_fast.__version__
    assert cited[1] == newest[1] == gemmascope_fast.__version__ == project["version"]


def test_oldest_torch_is_the_one_that_the_code_is_compiled_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = (d.removeprefix("torch>=") for d in project["dependencies"] if "torch" in d)
    text = (ROOT / "CMakeLists.txt").read_text()
    target = re.search(r"TORCH_TARGET_VERSION=0x(..)(..)0{12}\)", text)
    assert target and ".".join(str(int(part, 16)) for part in target.groups()) == oldest


def test_citation_has_what_the_format_requires():
    # Keys of the Citation File Format 1.2.0; every value here is plain text on the key's line.
    text = (ROOT / "CITATION.cff").read_text()
    keys = dict(re.findall(r"^([a-z-]+): *(.*)$", text, re.MULTILINE))
    assert {"cff-version", "message", "title", "authors"} <= keys.keys()
    assert keys["cff-version"] == "1.2.0" and keys["type"] == "software"
    assert "license" in keys and re.findall(r"^  - name: (.+)$", text, re.MULTILINE)


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
