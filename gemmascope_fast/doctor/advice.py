"""What follows from a report: what is wrong, what could be faster here, and what to do about it.

Every rule is a function of the report alone, so that a report sent by mail tells the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .machine import INT8_FLAGS, SIMD_FLAGS

TESTED_TORCH = ("2.11", "2.13")
"""Versions of torch that this release ran with: on an H200, and on CPUs."""

RANKS = list(SIMD_FLAGS)  # best first
MOST = {"x86_64": "avx512", "AMD64": "avx512", "aarch64": "neon", "arm64": "neon"}
"""The target with the widest vectors, by `platform.machine()`."""

Level = Literal["problem", "slow", "note"]
Report = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        level: "problem": a result may be wrong or the library does not serve; "slow": this machine
            could do better; "note": nothing to be done here, or nothing that must be.
        what: what was found.
        do: what to do; empty when there is nothing.
    """

    level: Level
    what: str
    do: str = ""

    def to_json(self) -> dict[str, str]:
        """As a JSON object."""
        return asdict(self)


def advise(found: Report) -> list[Advice]:
    """All that follows from a report, problems first."""
    rules = (_failures, _library, _forced, _processor, _threads, _gpu, _torch)
    advice = [a for rule in rules for a in rule(found)]
    return sorted(advice, key=lambda a: ("problem", "slow", "note").index(a.level))


def failures(found: Report) -> list[str]:
    """`op on device: what went wrong` of each failed self-test of a report."""
    return [
        f"{name} on {device}: {row['self_test']}"
        for name, devices in found["ops"].items()
        for device, row in devices.items()
        if row["self_test"] not in ("pass", "")
    ]


def _failures(found: Report) -> Iterator[Advice]:
    for text in failures(found):
        yield Advice(
            "problem",
            f"FAILED {text}",
            "report it with what `python -m gemmascope_fast doctor --json` prints; do not trust "
            "its results",
        )


# the library


def _library(found: Report) -> Iterator[Advice]:
    install, build = found["install"], found["build"]
    version = found["versions"]["gemmascope_fast"]
    if install["missing"] and "GEMMASCOPE_FAST_BACKEND" not in install["missing"]:
        what = f"the package at {install['path']} has no compiled library: plain PyTorch, the slow "
        what += "reference, answers on the CPU"
        yield Advice("problem", what, _how_to_build(install))
    elif build is not None and build["version"] != version:
        yield Advice(
            "problem",
            f"the compiled library is of version {build['version']}, the package of {version}",
            "build again: " + _how_to_build(install),
        )


def _how_to_build(install: dict[str, Any]) -> str:
    if install["elsewhere"]:
        return (
            f"leave this folder: from inside it Python finds this source tree before the installed "
            f"package at {install['elsewhere']}; or run `make build` to build in place"
        )
    if install["checkout"]:
        return (
            "run `make build` here, or `pip install --no-build-isolation .` and leave this folder, "
            "which Python would find before the installed package"
        )
    return "install a wheel of this platform, or `pip install --no-build-isolation .` in a checkout"


def _forced(found: Report) -> Iterator[Advice]:
    settings = found["environment"]
    if backend := settings.get("GEMMASCOPE_FAST_BACKEND"):
        yield Advice(
            "slow",
            f"GEMMASCOPE_FAST_BACKEND={backend} keeps every op from faster implementations",
            "unset it",
        )
    if settings.get("GEMMASCOPE_FAST_SCREEN") == "never" and found["cpu"]["int8"]:
        yield Advice(
            "slow",
            "GEMMASCOPE_FAST_SCREEN=never: encoders do not use this processor's int8 products",
            "unset it: the results are the same bits",
        )


# the processor


def _processor(found: Report) -> Iterator[Advice]:
    cpu = found["cpu"]
    if found["build"] is None:
        return  # nothing of it serves
    target, best = cpu["simd_target"], cpu["simd_best"]
    if target != best and "GEMMASCOPE_FAST_CPU" in found["environment"]:
        yield Advice(
            "slow",
            f"GEMMASCOPE_FAST_CPU={target}, where the {best} code would run",
            "unset it: the results are the same bits",
        )
    elif cpu["machine"] not in MOST:
        yield Advice("note", f"the portable code serves: there is no other for {cpu['machine']}")
    elif RANKS.index(target) > RANKS.index(most := MOST[cpu["machine"]]):
        better = "avx2" if (target, most) == ("generic", "avx512") else most
        lacks = sorted(SIMD_FLAGS[better] - set(cpu["features"]))
        why = f"the processor lacks {', '.join(lacks)}" if lacks else "no other was built"
        yield Advice("note", f"the {target} code serves: {why}")
    elif not cpu["int8"]:
        yield Advice(
            "note",
            f"the processor lacks {INT8_FLAGS[most]}: without int8 dot products encoders compute "
            "float32 products throughout, and gsf.pack brings nothing",
        )


def _threads(found: Report) -> Iterator[Advice]:
    cpu, settings = found["cpu"], found["thread_settings"]
    threads, cores, most = cpu["threads"], cpu["cores"], cpu["processors"]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
    set_by = [f"{name}={settings[name]}" for name in names if name in settings]
    because = f" ({', '.join(set_by)})" if set_by else ""
    if 0 < threads < cores:
        yield Advice(
            "slow",
            f"torch uses {threads} of {cores} cores{because}",
            f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores}, unless other processes "
            "use the rest",
        )
    elif 0 < most < threads:
        yield Advice(
            "note",
            f"torch uses {threads} threads, and this process may use {most} processors{because}",
            f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores}",
        )


# GPUs


def _gpu(found: Report) -> Iterator[Advice]:
    gpu, build, torch = found["gpu"], found["build"], found["versions"]["torch"]
    if not gpu["devices"]:
        if gpu["nvidia_driver"] and not gpu["torch_cuda"]:
            yield Advice(
                "slow",
                f"an NVIDIA driver is here, but torch {torch} is built without CUDA",
                "install a CUDA build of torch, then build this library with nvcc on the PATH",
            )
        elif gpu["nvidia_driver"]:
            yield Advice(
                "slow",
                f"an NVIDIA driver is here, but torch {torch} finds no device",
                "run nvidia-smi; look at CUDA_VISIBLE_DEVICES and at the driver's version, which "
                f"must serve CUDA {gpu['torch_cuda']}",
            )
        return
    forced = "GEMMASCOPE_FAST_BACKEND" in found["environment"]
    if build is None or gpu["torch_hip"] or forced:
        return
    if not build["cuda_archs"]:
        absent = found["versions"]["triton"] == "absent"
        serves = "plain PyTorch serves" if absent else "Triton's kernels serve"
        yield Advice(
            "slow",
            f"the library was built without CUDA, although a GPU is present: {serves} there",
            "build again with nvcc on the PATH; GEMMASCOPE_FAST_CUDA=1 makes its absence an error",
        )
        return
    for capability in sorted({d["capability"] for d in gpu["devices"]}):
        yield from _architecture(capability, build["cuda_archs"])


def _architecture(capability: str, archs: list[str]) -> Iterator[Advice]:
    """`archs` as CMake names them: 80 (machine code and PTX), 86-real, 90a, ..."""
    major, minor = map(int, capability.split("."))
    built = ", ".join(archs)
    again = f"build again with CUDAARCHS={major}{minor}{'a' if major >= 9 else ''}"
    if (major, minor) < (8, 0):
        yield Advice(
            "note",
            f"compute capability {capability} is below 8.0, which the compiled kernels need",
            "GEMMASCOPE_FAST_BACKEND=reference computes there with plain PyTorch",
        )
        return
    plain = [a.removesuffix("-real").removesuffix("-virtual") for a in archs]
    exact = f"{major}{minor}"
    runs = {exact, f"{exact}a", f"{exact}f"} & set(plain)
    same = any(p.isdigit() and int(p) // 10 == major and int(p) % 10 <= minor for p in plain)
    ptx = any(
        p.isdigit() and int(p) <= int(exact) and not a.endswith("-real")
        for p, a in zip(plain, archs, strict=True)
    )
    if not (runs or same or ptx):
        yield Advice(
            "problem",
            f"the library has no code for compute capability {capability} (built for {built})",
            again,
        )
    elif major >= 9 and f"{exact}a" not in plain:
        yield Advice(
            "slow",
            f"compute capability {capability} runs code of an older one (built for {built})",
            again,
        )


def _torch(found: Report) -> Iterator[Advice]:
    version = found["versions"]["torch"]
    if ".".join(version.split(".")[:2]) not in TESTED_TORCH:
        yield Advice(
            "note",
            f"torch {version} is not among the versions this release ran with "
            f"({', '.join(TESTED_TORCH)}); the self-tests above did run with it",
        )
