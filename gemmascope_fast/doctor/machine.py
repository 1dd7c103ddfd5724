"""The facts of a report: versions, processor, GPUs, build, environment."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops, triton_launchers

PACKAGE = Path(__file__).resolve().parent.parent
PROC, CGROUP, DEV = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev")

AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
SIMD_FLAGS = {
    "avx512_amx": AVX512 | {"avx512_vnni", "amx_tile", "amx_int8"},
    "avx512": AVX512,
    "avx2_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon": {"asimd"},
    "generic": set[str](),
}
"""Processor flags (as in /proc/cpuinfo) that each SIMD target needs, best target first."""

INT8_FLAGS = {"avx512_amx": "amx_int8", "avx512": "avx512_vnni", "neon": "asimddp"}
"""Flag of the int8 dot products that a target wants: AVX-512 and NEON began without them."""

BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that bind a process's first thread, and so hide what the others may use."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", *BINDING)


def versions() -> dict[str, str]:
    """Of the package and of what it runs on."""
    return {
        "gemmascope_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": importlib.import_module("triton").__version__
        if triton_launchers.FOUND
        else "absent",
    }


def build_info() -> dict[str, Any] | None:
    """What the build wrote about itself; None when nothing was built."""
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else None


def install() -> dict[str, Any]:
    """Which copy of the package this is, and whether it stands in front of a built one."""
    return {
        "path": str(PACKAGE),
        "checkout": (PACKAGE.parent / "setup.py").exists(),
        "missing": ops.NATIVE_MISSING,
        "elsewhere": _built_elsewhere(),
    }


def _built_elsewhere() -> str:
    """Folder of an installed package with a compiled library, other than this one, or ""."""
    for found in metadata.distributions(name="gemmascope-fast"):
        folder = Path(str(found.locate_file("gemmascope_fast"))).resolve()
        if folder != PACKAGE and any(folder.glob("*.abi3.so")):
            return str(folder)
    return ""


# the processor


def cpu() -> dict[str, Any]:
    """Instruction sets, and threads beside the cores and processors that they have."""
    flags = _cpu_flags()
    known = SIMD_FLAGS["avx512"] | SIMD_FLAGS["neon"] | set(INT8_FLAGS.values())
    shown = [f for f in sorted(flags) if f in known or "vnni" in f or "amx" in f]
    target = simd_target(flags)
    cores, processors = _cores()
    return {
        "machine": platform.machine(),
        "features": shown,
        "simd_target": target,
        "simd_best": _best_target(flags),
        "int8": target.startswith("avx2") or INT8_FLAGS.get(target) in flags,
        "threads": torch.get_num_threads(),
        "cores": cores,
        "processors": processors,
    }


def simd_target(flags: set[str]) -> str:
    """Instruction set of the CPU kernels: the best that was built and that `flags` allow.

    `GEMMASCOPE_FAST_CPU` names another; the kernels refuse one that is not available.
    """
    return os.environ.get("GEMMASCOPE_FAST_CPU") or _best_target(flags)


def _best_target(flags: set[str]) -> str:
    built = (build_info() or {"cpu_targets": ["generic"]})["cpu_targets"]
    return next(name for name, need in SIMD_FLAGS.items() if name in built and need <= flags)


def _cpu_flags() -> set[str]:
    lines = _lines(PROC / "cpuinfo")
    flags: set[str] = next(
        (set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    if "amx_tile" in flags and not _may_use_amx():
        return {flag for flag in flags if not flag.startswith("amx")}
    return flags


def _may_use_amx() -> bool:
    """Whether Linux lets this process use the tile registers: asked as simd_target.cpp asks."""
    arch_prctl, request, tile_data = map(ctypes.c_long, (158, 0x1023, 18))
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def _cores() -> tuple[int, int]:
    """Cores and processors (two on a core with SMT) that this process may use; 0: unknown."""
    if any(os.environ.get(name) for name in BINDING):
        return 0, 0
    allowed = os.sched_getaffinity(0)
    cores: set[tuple[str, str]] = set()
    entry: dict[str, str] = {}
    for line in [*_lines(PROC / "cpuinfo"), ""]:
        key, _, value = line.partition(":")
        if key.strip():
            entry[key.strip()] = value.strip()
        elif entry:
            if int(entry.get("processor", -1)) in allowed and "core id" in entry:
                cores.add((entry.get("physical id", ""), entry["core id"]))
            entry = {}
    quota = _quota()
    processors = min(len(allowed), quota or len(allowed))
    return min(len(cores) or processors, processors), processors


def _quota() -> int:
    """Processors that the control group's quota amounts to, rounded up; 0 when there is none."""
    words = (_lines(CGROUP / "cpu.max") or [""])[0].split()
    if not words:  # version 1
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [line for file in files for line in _lines(CGROUP / "cpu" / file)]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return 0
    return max(1, -(-int(words[0]) // int(words[1])))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# GPUs


def gpu() -> dict[str, Any]:
    """What the system, torch and the driver say about GPUs."""
    devices = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            devices.append(
                {"name": torch.cuda.get_device_name(i), "capability": f"{major}.{minor}"}
            )
    driver = (PROC / "driver" / "nvidia" / "version").exists() or (DEV / "nvidia0").exists()
    return {
        "nvidia_driver": driver,
        "torch_cuda": torch.version.cuda or "",
        "torch_hip": torch.version.hip or "",
        "devices": devices,
    }


def environment() -> dict[str, str]:
    """Our variables."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("GEMMASCOPE_FAST_")}


def thread_settings() -> dict[str, str]:
    """Variables that say how many threads torch has, and where."""
    return {name: os.environ[name] for name in THREADS if os.environ.get(name)}
