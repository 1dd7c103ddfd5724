"""Parts `environment` and `build`: what this machine is and has, and the compiled library on it.

Only queries: no setting of the device is touched.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .context import ROOT, Context, Skip, commit, output

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pytest", "hypothesis", "pybind11", "cmake")
PACKAGES += ("ninja", "setuptools", "matplotlib")
TOOLS = ("nvcc", "g++", "cmake", "ninja", "compute-sanitizer", "ncu", "cuobjdump")
CLOCKS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
CLOCKS += ("power.draw", "power.limit", "temperature.gpu", "memory.total", "memory.used")


def slug(device: str) -> str:
    """Name of the device in file names: "h100_80gb_hbm3", or "cpu"."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name())"
    name = smi("name").get("name") or output([sys.executable, "-c", code], 120)
    if not name:
        raise SystemExit("no CUDA device here; `--device cpu --quick` rehearses on toy sizes")
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia")).strip("_")


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi tells of the first device; empty without it."""
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    values = output(["nvidia-smi", *query]).split(", ")
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def tool(name: str) -> str | None:
    """Path of a program: on PATH, in CUDA's folder, or beside the interpreter."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", os.path.dirname(sys.executable)]
    folders.append("/usr/local/cuda/compute-sanitizer")
    return shutil.which(name, path=os.pathsep.join(folders))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    for name in TOOLS:
        path = tool(name)
        told = output([path, "--version"]).splitlines() if path else []
        release = next((t for t in told if "release" in t.lower() or "version" in t.lower()), "")
        found[f"{name} (program)"] = (release or "present").strip() if path else "absent"
    return found


# ---- environment


def environment(ctx: Context) -> None:
    """Device, clocks, versions, state of the checkout, and what serves each op."""
    ctx.row("device", lambda: _device(ctx))
    ctx.row("versions", lambda: {"versions": versions(), "line": f"commit {commit()}"})
    ctx.row("implementations", lambda: _implementations(ctx))


def _device(ctx: Context) -> dict[str, Any]:
    import torch

    if ctx.settings.device == "cpu":
        about: dict[str, Any] = {"name": platform.processor() or platform.machine(), "type": "cpu"}
        about["threads"] = torch.get_num_threads()
    else:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
        p = torch.cuda.get_device_properties(0)
        about = {
            **{"name": p.name, "type": "cuda", "capability": f"{p.major}.{p.minor}"},
            **{"processors": p.multi_processor_count, "memory_bytes": p.total_memory},
            **{"l2_bytes": p.L2_cache_size, "cuda": torch.version.cuda, "hip": torch.version.hip},
            "query": smi(*CLOCKS),
        }
    ctx.results.data["device"] = about
    return {"device": about, "line": about["name"]}


def _implementations(ctx: Context) -> dict[str, Any]:
    from gemmascope_fast import ops

    kind = "cuda" if ctx.settings.device == "cuda" else "cpu"
    found = {name: ops.implementation(name, kind) for name in ops.TABLE}
    counts = {i: list(found.values()).count(i) for i in sorted(set(found.values()))}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return {"implementations": found, "native_missing": ops.NATIVE_MISSING, "line": told}


# ---- build


def build(ctx: Context) -> None:
    """The compiled library, CUDA half included, where everything it needs is present."""
    ctx.row("native library", lambda: _build(ctx))


def missing_for_build(found: Callable[[str], bool], packages: Callable[[str], bool]) -> list[str]:
    """What a build lacks here, tools and Python packages."""
    tools = [name for name in ("nvcc", "g++") if not found(name)]
    modules = ("cmake", "ninja", "pybind11", "setuptools")
    return tools + [f"Python package {name}" for name in modules if not packages(name)]


def _build(ctx: Context) -> dict[str, Any]:
    if ctx.settings.quick or ctx.settings.device == "cpu":
        raise Skip("not built by quick runs, nor for a CPU: `make build` does it")
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        raise Skip("there is no CUDA source")
    absent = missing_for_build(
        lambda name: tool(name) is not None, lambda name: importlib.util.find_spec(name) is not None
    )
    if absent:
        raise Skip(f"missing: {', '.join(absent)}; Triton and the reference serve without it")
    return _run_build(max(ctx.remaining() - 5, 1))


def _run_build(limit_s: float) -> dict[str, Any]:
    env = {**os.environ, "GEMMASCOPE_FAST_CUDA": "1"}
    nvcc = tool("nvcc")
    assert nvcc is not None
    env["PATH"] = os.pathsep.join([os.path.dirname(nvcc), env.get("PATH", "")])
    env["CUDACXX"] = nvcc
    capability = smi("compute_cap").get("compute_cap", "").replace(".", "")
    if capability:
        specific = "a" if capability in ("90", "100", "120") else ""  # unlocks wgmma and the like
        env["CUDAARCHS"] = f"{capability}{specific}-real"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit_s
    )
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    if done.returncode:
        raise RuntimeError(f"setup.py build_ext ended with {done.returncode}\n{tail}")
    return {"architectures": env.get("CUDAARCHS", "default"), "line": "built in place"}
