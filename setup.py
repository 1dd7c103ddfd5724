"""Builds the native library with CMake: CMakeLists.txt owns sources, flags and architectures."""

import fcntl
import os
import sys
from pathlib import Path
from subprocess import check_call

import cmake
import ninja
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self):
        in_place = self.inplace or self.editable_mode
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        cuda = os.environ.get("GEMMASCOPE_FAST_CUDA", "AUTO")
        build = ROOT / "build" / sys.implementation.cache_tag  # kept: builds are incremental
        build.mkdir(parents=True, exist_ok=True)
        run = [os.path.join(cmake.CMAKE_BIN_DIR, "cmake")]
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DGSF_CUDA={cuda}", "-G", "Ninja"]
        options += [f"-DCMAKE_MAKE_PROGRAM={os.path.join(ninja.BIN_DIR, 'ninja')}"]
        with open(build / "lock", "w") as lock:  # Ninja does not guard against a second build
            fcntl.flock(lock, fcntl.LOCK_EX)
            check_call([*run, "-S", ROOT, "-B", build, "--log-level=NOTICE", *options])
            for target in ("_C", "_testing") if in_place else ("_C",):
                check_call([*run, "--build", build, "--target", target])
                check_call([*run, "--install", build, "--component", target, "--prefix", prefix])


setup(
    ext_modules=[Extension("gemmascope_fast._C", [], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
