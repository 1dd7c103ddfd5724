"""The NEON code on an emulated processor, against the portable code on this one, bit for bit.

csrc/testing/emulated/simd_tables.cpp prints a digest per case of what csrc/cpu/simd gives. It needs
a cross compiler and QEMU (Debian: g++-aarch64-linux-gnu, qemu-user-static).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = [*sorted(CSRC.glob("cpu/simd/*.cpp")), CSRC / "testing" / "emulated" / "simd_tables.cpp"]
FUNCTIONS = {
    *("above", "panel", "pairs", "widen", "narrow", "transpose", "gather", "sweep", "adam"),
    *("quantise", "tile", "fine_dots"),
}


def which(*names: str) -> str:
    """The first that is installed; skips without any."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{' or '.join(names)} is not installed")
    return found


def cases(
    compiler: str, target: str, program: Path, *options: str, run: tuple[str, ...] = ()
) -> list[str]:
    """What the tables of `target` print."""
    flags = [
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        f"-I{CSRC}",
        f"-DGSF_TARGET={target}",
        *options,
    ]
    command = [compiler, *flags, *map(str, SOURCES), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([*run, str(program)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_neon_gives_the_bits_of_the_portable_code(tmp_path: Path) -> None:
    cross = which("aarch64-linux-gnu-g++")
    emulator = which("qemu-aarch64-static", "qemu-aarch64")
    own = which("c++", "g++", "clang++")
    wanted = cases(own, "portable", tmp_path / "own")
    found = cases(cross, "neon", tmp_path / "neon", "-DGSF_NEON", "-static", run=(emulator,))
    assert {re.split(r"[ :]", case)[0] for case in wanted} == FUNCTIONS
    assert [case for case in found if case not in wanted] == []
    assert [case for case in wanted if case not in found] == []
    screens = [case for case in wanted if case.startswith(("tile", "fine_dots"))]
    assert all(found.count(case) == 2 for case in screens)  # portable and sdot
