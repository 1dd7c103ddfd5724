"""Compiles Triton kernels for machines that are not here, and reads the compiler's report.

Launchers are called with `meta` tensors of real shapes; each launch is compiled for a target with
exactly the types and specialisations it would have there, and not run.

    python tests/compiling.py [target ...]
rewrites the budget that test_triton_compiled.py holds kernels to.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemmascope_fast.kernels import launching

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOOSE = {
    "ptx": re.compile(
        r"\b(?:fma|mul\.f|add\.f|sub\.f|div\.f|div\.approx|sqrt\.approx|\w+\.ftz)[.\w]*"
    ),
    "amdgcn": re.compile(r"\bv_(?:pk_)?(?:fmac?|mad|mac)_f32\w*"),
}
"""What rounds two operations at once, or one not correctly; AMD's divisions consist of it."""
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_\w+)")


@dataclass(frozen=True)
class Report:
    """What the compiler says of one launch on one target."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    instructions: int
    tensor_cores: bool
    narrow: list[str]
    loose: list[str]
    sums: list[str]
    binary: bytes

    @property
    def assembly(self) -> str:
        """Disassembly of an NVIDIA kernel, for finer questions; it takes a second."""
        return _run_tool("nvdisasm", self.binary, "-c")


def compile_launches(target: str, run: Callable[[], Any]) -> list[Report]:
    """Call `run`, which launches kernels on meta tensors, and compile what it launches."""
    reports: list[Report] = []

    def observe(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert 0 < programs < 2**31
        reports.append(_compile(kernel, target, args, options))

    was = launching._run, launching.COMPILE_TARGET
    launching._run, launching.COMPILE_TARGET = observe, target
    try:
        run()
    finally:
        launching._run, launching.COMPILE_TARGET = was
    return reports


def _compile(kernel: Any, target: str, args: tuple[Any, ...], options: dict[str, Any]) -> Report:
    names = kernel.arg_names
    bound = dict(zip(names, args, strict=False))
    bound |= {k: v for k, v in options.items() if k not in OPTIONS}
    assert set(bound) == set(names), f"{kernel.__name__}: {set(bound) ^ set(names)}"
    constexprs = {names[i] for i in kernel.constexprs}
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def specialise(value: Any, at: tuple[int, ...], name: str) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(specialise(v, (*at, k), "") for k, v in enumerate(value)))
        plain = bool(name) and kernel.params[at[0]].do_not_specialize
        kind, divisible = _specialise(value, name in constexprs, plain)
        if kind == "constexpr":
            values[at] = value
        if divisible:
            attributes[at] = [["tt.divisibility", 16]]
        return kind

    for at, name in enumerate(names):
        signature[name] = specialise(bound[name], (at,), name)
    source = ASTSource(kernel, signature, values, attributes)
    chosen = {k: v for k, v in options.items() if k in OPTIONS}
    done = triton.compile(source, target=_gpu(target), options=chosen)
    read = _amd_report if target.startswith("gfx") else _nvidia_report
    return read(kernel.__name__, target, done)


def _specialise(value: Any, constexpr: bool, plain: bool = False) -> tuple[str, bool]:
    """Type of an argument in Triton's notation, and whether 16 divides it; not of a `plain` one."""
    if constexpr or value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        aligned = (value.storage_offset() * value.element_size()) % 16 == 0
        return f"*{TYPES[value.dtype]}", aligned
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, float):
        return "fp32", False
    assert isinstance(value, int), f"{value!r} cannot be a kernel argument"
    if value == 1 and not plain:
        return "constexpr", False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, value % 16 == 0 and not plain


def _gpu(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target[3:]), 32)


def _nvidia_report(name: str, target: str, done: Any) -> Report:
    cubin = done.asm["cubin"]
    usage = _run_tool("cuobjdump", cubin, "-res-usage")
    return Report(
        name,
        target,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared=done.metadata.shared,
        instructions=_text_bytes(cubin) // 16,
        tensor_cores=bool(TENSOR_CORE.search(done.asm["ptx"])),
        **_read(done, "ptx"),
        binary=cubin,
    )


def _read(done: Any, form: str) -> dict[str, list[str]]:
    """What a report says of the compiler's intermediate forms."""
    return {
        "narrow": narrow_products(done.asm["ttir"]),
        "loose": sorted(set(LOOSE[form].findall(done.asm[form]))),
        "sums": reductions(done.asm["ttgir"]),
    }


def reductions(ttgir: str) -> list[str]:
    """Type and layout of what each reduction sums: they decide the order of the sum."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.M))
    found = re.findall(r'"tt\.reduce"\(.*?\}\) : \((tensor<.*?>)\) ->', ttgir, re.S)
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), t) for t in found]


def _text_bytes(elf: bytes) -> int:
    """Size of the code in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = sections[names_at][4]
    return sum(s[5] for s in sections if elf.startswith(b".text", names + s[0]))


def _amd_report(name: str, target: str, done: Any) -> Report:
    text = done.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    return Report(
        name,
        target,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        shared=done.metadata.shared,
        instructions=len(re.findall(r"^\t[vsdgb]\w*_\w+", text, re.MULTILINE)),
        tensor_cores=bool(TENSOR_CORE.search(text)),
        **_read(done, "amdgcn"),
        binary=text.encode(),
    )


def _run_tool(tool: str, cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def narrow_products(ttir: str) -> list[str]:
    """32-bit products that reach a pointer: lines of the IR, which must be none."""
    lines: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    roots: list[str] = []
    for line in ttir.splitlines():
        found = re.match(r"\s*(%[\w#:]+)\s*=\s*(.*?)(?: loc\(.*)?$", line)
        if not found:
            continue
        name, text = found[1].split(":")[0], found[2]
        lines[name], sources[name] = text, re.findall(r"%\w+", text)
        if text.startswith("tt.addptr"):
            roots += sources[name][1:2]
    seen: set[str] = set()
    wrong: list[str] = []
    while roots:
        name = roots.pop()
        if name in seen or name not in lines:
            continue
        seen.add(name)
        text = lines[name]
        if text.startswith(("tt.load", "arith.cmpi")):
            continue  # a value that was read, or a truth value: not an address of our making
        if text.startswith("arith.muli") and re.search(r"\bi32\b|xi32>", text):
            wrong.append(text)
        roots += sources[name]
    return wrong


# ---- the committed budget

BUDGET = Path(__file__).parent / "kernel_budget.json"
LIMITED = ("registers", "spills", "shared", "instructions")


def specimens() -> dict[str, Callable[[], Any]]:
    """Every specimen of `specimens/`, by name."""
    folder = Path(__file__).parent / "specimens"
    found: dict[str, Callable[[], Any]] = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        named = importlib.import_module(f"specimens.{path.stem}").SPECIMENS
        assert not set(named) & set(found), f"{path}: names in use {set(named) & set(found)}"
        found |= named
    return found


def reports(name: str, target: str) -> list[Report]:
    """What one specimen launches, compiled for one target (in a worker process too)."""
    return compile_launches(target, specimens()[name])


def measured(report: Report) -> dict[str, Any]:
    """The numbers of a report that the budget limits."""
    return {"kernel": report.kernel, **{key: getattr(report, key) for key in LIMITED}}


def write_budget(targets: Sequence[str] = TARGETS) -> None:
    """Rewrite `kernel_budget.json`, keeping the larger number where it has one already.

    Run it under the oldest and under the newest Triton: the budget holds for both. Delete the file
    first to forget what earlier kernels needed.
    """
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    work = [(name, target) for target in targets for name in specimens()]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for (name, target), done in zip(
            work, pool.map(reports, *zip(*work, strict=True)), strict=True
        ):
            found = [measured(r) for r in done]
            before = budget.setdefault(name, {}).get(target, [])
            if [b["kernel"] for b in before] == [f["kernel"] for f in found]:
                for new, old in zip(found, before, strict=True):
                    new.update({key: max(new[key], old[key]) for key in LIMITED})
            budget[name][target] = found
            print(name, target, *(tuple(f.values()) for f in found), flush=True)
            BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_budget(sys.argv[1:] or TARGETS)
