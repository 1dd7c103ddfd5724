"""Reads the CUDA half of the built library: resources and instructions of its kernels.

    python tests/compiling_cuda.py
rewrites the budget that test_cuda_compiled.py holds kernels to, for the architectures built: after
`make build`, a minute on two cores for the six that CMakeLists.txt lists.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGET = Path(__file__).parent / "cuda_budget.json"
LIMITED = ("registers", "stack", "shared", "instructions")
OURS = "gemmascope_fast::"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\d) +)?([^;]*);|^\s*(\.\w+):", re.M)
MADE = re.compile(r"U?PLOP3\.LUT (U?P\d), U?PT, U?PT, U?PT, U?PT, 0x([0-9a-f]+), 0x")
JUMPS = re.compile(r"\b(?:BR\w|BSSY|BRX|CALL|JMP|JMX|RET|SSY|WARPSYNC)\b\S* [^;]*?0x([0-9a-f]+)")
UNKNOWN = re.compile(r"(?:U?R2U?P|BRX|JMX|CALL|RET)\b")
"""Behind these any predicate may have any value."""
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", re.M)


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel on one architecture."""

    registers: int
    stack: int
    """Bytes of local memory: what is spilled, and arrays that are not in registers."""
    shared: int
    """Bytes of static shared memory."""
    instructions: int
    opcodes: Counter[str]
    never: tuple[str, ...]
    """Instructions that wait for a predicate that was just made false."""

    def count(self, opcode: str) -> int:
        """Instructions whose opcode matches this expression from its beginning."""
        return sum(n for name, n in self.opcodes.items() if re.match(opcode, name))

    @property
    def measured(self) -> dict[str, int]:
        """The numbers that the budget limits."""
        return {key: getattr(self, key) for key in LIMITED}


def missing() -> str:
    """Why nothing can be read here, or ''."""
    if not tool().exists():
        return "no cuobjdump: neither on the PATH nor with triton"
    if library() is None:
        return "the native library is not built"
    return "" if architectures() else "the native library was built without CUDA"


def tool() -> Path:
    """`cuobjdump` of the CUDA toolkit, else the one that comes with triton."""
    found, triton = shutil.which("cuobjdump"), find_spec("triton")
    if found or triton is None or triton.origin is None:
        return Path(found or "cuobjdump")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def library() -> Path | None:
    """The native library that tests load."""
    found = find_spec("gemmascope_fast._C")
    return Path(found.origin) if found and found.origin else None


def dump(*options: str, check: bool = True) -> str:
    """What cuobjdump prints of the library."""
    command = [tool(), *options, library()]
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


@cache
def architectures() -> tuple[str, ...]:
    """Those that the library has machine code for: sm_80, sm_90a, ..."""
    listed = dump("-lelf", check=False)  # it fails where there is no device code at all
    return tuple(sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listed))))


def listed() -> set[str]:
    """Those that CMakeLists.txt builds when nobody chooses: a user's library."""
    sets = re.findall(
        r"GSF_CUDA_ARCHS ((?:\w+(?:-real)?[ )])+)", (ROOT / "CMakeLists.txt").read_text()
    )
    return {f"sm_{arch}" for text in sets for arch in re.findall(r"(\d+a?)(?:-real)?[ )]", text)}


def read_side_by_side(chosen: Iterable[str]) -> None:
    """Fills `reports` for these architectures: a process each, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(reports, chosen))


@cache
def reports(architecture: str) -> dict[str, Report]:
    """Every kernel of ours by name, built for this architecture."""
    usage = dump("-res-usage", "-arch", architecture)
    found = re.findall(r"Function (\w+):\s+(REG.*)", usage)
    resources = {name: values for name, values in found if demangled(name).startswith(OURS)}
    if not resources:
        return {}
    functions = dump("-sass", "-arch", architecture).split("Function : ")[1:]
    made: dict[str, Report] = {}
    for code in functions:
        name = code.split("\n", 1)[0].strip()
        if name not in resources:
            continue
        values = resources.pop(name)
        counts = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", values)}
        opcodes = Counter(INSTRUCTION.findall(code))
        del opcodes["NOP"]
        assert kernel(name) not in made, f"two kernels are called {kernel(name)}"
        made[kernel(name)] = Report(
            counts["REG"],
            counts["STACK"] + counts["LOCAL"],
            counts["SHARED"],
            opcodes.total(),
            opcodes,
            never_executed(code),
        )
    assert not resources, "kernels without code"
    return made


def never_executed(code: str) -> tuple[str, ...]:
    """Instructions of straight code whose predicate has been set to false and not since.

    The assembler of CUDA 13.0 makes them of tensor copies under a condition: the copy is issued,
    and a coordinate of its box is never handed over.
    """
    targets = {int(address, 16) for address in JUMPS.findall(code)}
    false: set[str] = set()
    found = []
    for address, negated, guard, text, label in LINE.findall(code):
        if label or int(address, 16) in targets:
            false.clear()
        if guard in false and not negated:
            found.append(f"{address}: @{guard} {text.strip()}")
        if UNKNOWN.match(text):
            false.clear()
        false -= set(re.findall(r"\bU?P\d\b", text))  # read or written: as good as unknown
        made = MADE.match(text)
        if made and not guard and not int(made[2], 16) & 0x80:  # of three that are true
            false.add(made[1])
    return tuple(found)


@cache
def intermediate() -> dict[str, str]:
    """PTX of our kernels, by name: of the last architecture that carries it."""
    parts = re.split(r"\.entry (\w+)", dump("-ptx"))
    named = zip(parts[1::2], parts[2::2], strict=True)
    return {kernel(name): text for name, text in named if demangled(name).startswith(OURS)}


@cache
def demangled(name: str) -> str:
    """`gemmascope_fast::f<8>(gemmascope_fast::P)` of _ZN15gemmascope_fast1f..."""
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = function(name.encode(), None, None, ctypes.byref(status))
    if not text:
        return name
    result = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return result.removeprefix("void ")


def kernel(name: str) -> str:
    """Name of a kernel with its template's arguments, and no more."""
    text = demangled(name).replace("(anonymous namespace)::", "")
    text = re.sub(r"\((?:\w|::| )+\)(?=-?\w)", "", text)  # casts: f<(int)8> is f<8>
    return re.sub(r"\w+::", "", text[: text.index("(")])


def stem(name: str) -> str:
    """Name of a kernel without its template's arguments."""
    return name.split("<")[0]


def write_budget(chosen: Sequence[str]) -> None:
    """Rewrite `cuda_budget.json` for these architectures; the others' part stays."""
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    read_side_by_side(chosen)
    for architecture in chosen:
        found = reports(architecture)
        budget[architecture] = {name: report.measured for name, report in found.items()}
        for name, report in sorted(found.items()):
            print(architecture, name, report.measured, flush=True)
    BUDGET.write_text(as_text(budget))


def as_text(budget: dict[str, dict[str, dict[str, int]]]) -> str:
    """The budget as JSON, a kernel a line."""
    parts = []
    for architecture, kernels in sorted(budget.items()):
        lines = [f'  "{name}": {json.dumps(kernels[name])}' for name in sorted(kernels)]
        parts.append(f' "{architecture}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    write_budget(architectures())
