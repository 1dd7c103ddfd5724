"""`python -m gemmascope_fast doctor`: what serves each op on this machine, why, and a self-test.

The self-test runs every op on whole numbers, where each sum is exact in float32, so that the
serving implementation and the reference must agree to the last bit, in values and gradients.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import __version__, ops, triton_launchers

PACKAGE = Path(__file__).parent
DEVICES = ("cpu", "cuda")
IMPLEMENTATIONS = ("native", "triton", "reference")
SIMD_FLAGS = {
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set[str](),
}
"""Processor flags (as in /proc/cpuinfo) that each SIMD target needs, best target first."""


def main(as_json: bool = False) -> int:
    """Print the report as text or as one JSON object; return 1 when a self-test fails, else 0."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return 1 if failures(found) else 0


def report() -> dict[str, Any]:
    """Everything `doctor` knows, in JSON types."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "build": build_info(),
        "environment": _environment(),
        "ops": {name: {device: _served(name, device) for device in DEVICES} for name in ops.TABLE},
    }


def failures(found: dict[str, Any]) -> list[str]:
    """`op on device: what went wrong` of each failed self-test of a report."""
    return [
        f"{name} on {device}: {row['self_test']}"
        for name, devices in found["ops"].items()
        for device, row in devices.items()
        if row["self_test"] not in ("pass", "")
    ]


def build_info() -> dict[str, Any] | None:
    """What the build wrote about itself; None when nothing was built."""
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else None


def simd_target(flags: set[str]) -> str:
    """Instruction set of the CPU kernels: the best that was built and that `flags` allow.

    `GEMMASCOPE_FAST_CPU` names another; the kernels refuse one that is not available.
    """
    built = (build_info() or {"cpu_targets": ["generic"]})["cpu_targets"]
    best = next(name for name, need in SIMD_FLAGS.items() if name in built and need <= flags)
    return os.environ.get("GEMMASCOPE_FAST_CPU") or best


# who serves what


def device_missing(device: str) -> str:
    """Why tensors cannot live on a device type here; empty when they can."""
    if device == "cpu" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA device"


def why_not(name: str, device: str, implementation: str) -> str:
    """Why `implementation` does not serve op `name` on a device type; empty when it does."""
    serving = ops.implementation(name, device)
    if (missing := device_missing(device)) or implementation == serving:
        return missing
    if ops.BACKEND and ops.BACKEND != implementation:
        return f"GEMMASCOPE_FAST_BACKEND={ops.BACKEND}"
    if implementation == "native":
        return ops.NATIVE_MISSING or _why_not_native(device)
    if implementation == "triton":
        return _why_not_triton(device)
    return f"{serving} is faster"


def _why_not_native(device: str) -> str:
    build = build_info()
    if device == "cuda" and build is not None and not build["cuda_archs"]:
        return "the compiled library was built without CUDA"
    return f"the compiled library has no {device} implementation"


def _why_not_triton(device: str) -> str:
    if device == "cpu":
        return "Triton kernels need a GPU"
    return "native is faster" if triton_launchers.FOUND else "triton is not installed"


def _served(name: str, device: str) -> dict[str, Any]:
    reasons = {i: why_not(name, device, i) for i in IMPLEMENTATIONS}
    serving = next((i for i, reason in reasons.items() if not reason), "none")
    tested = "" if device_missing(device) else self_test(name, device)
    return {
        "implementation": serving,
        "self_test": tested,
        "why_not": {i: reason for i, reason in reasons.items() if reason},
    }


# self-test


def self_test(name: str, device: str) -> str:
    """Compare what serves op `name` with the reference; "pass" or what went wrong."""
    expected = _run(name, getattr(getattr(torch.ops, ops.REFERENCE), name).default, device)
    try:
        found = _run(name, ops.overload(name), device)
    except Exception as error:  # any failure of the op under test is a finding to report
        return f"{type(error).__name__}: {error}"
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(ours, theirs):
            return f"tensor {at} of {len(expected)} differs from the reference"
    return "pass"


def _run(name: str, op: Callable[..., Any], device: str) -> list[Tensor]:
    """Outputs of the op on its sample, then the gradients of its floating-point inputs."""
    differentiable = ops.TABLE[name].differentiable and not name.endswith("_backward")

    def fresh(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.clone().requires_grad_(differentiable and a.is_floating_point())
        return a

    args = pytree.tree_map(fresh, list(_sample(name, device)))
    result = op(*args)
    outputs = [result] if isinstance(result, Tensor) else list(result or args[:1])
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    if not roots:
        return outputs
    seeds = [torch.arange(t.numel(), device=device).view(t.shape).to(t) % 5 - 1 for t in roots]
    return outputs + list(torch.autograd.grad(roots, leaves, seeds))


def _sample(name: str, device: str) -> tuple[Any, ...]:
    """Arguments of op `name`: whole numbers, 6 tokens of width 20, 40 latents."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, low: int = -3, high: int = 4) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float().to(device)

    x, W_enc, W_dec = whole(6, 20), whole(40, 20).t(), whole(40, 12)
    b_enc, theta, b_dec = whole(40), whole(40, low=10, high=20), whole(12)
    encoded = ops.TABLE["jumprelu_encode"].reference(x, W_enc, b_enc, theta, 8.0, None, True)
    offsets, indices, values, gate, _, *transpose = encoded
    entries, d_values, d_gate = (offsets, indices, values), whole(len(values)), whole(len(values))
    rows, latents = torch.tensor([[5, 0, 5], [39, 0, 7]], device=device)
    rates, rule = [0.5, 0.0, 0.75, 1.0], [1, 0, 0, 0, 0]
    samples: dict[str, tuple[Any, ...]] = {
        "jumprelu_encode": (x, W_enc, b_enc, theta, 8.0, None, True),
        "topk_encode": (x, W_enc, b_enc, 5, True),
        "batchtopk_encode": (x, W_enc, b_enc, 4.5, None, None, True),
        "decode": (*entries, W_dec, b_dec, *transpose, torch.float32),
        "decode_": (whole(6, 12), *entries, W_dec),
        "encode_backward": (
            *(d_values, d_gate, x, W_enc, theta, 8.0, *entries, gate, *transpose),
            *(True, True, True, True),
        ),
        "decode_backward": (whole(6, 12), *entries, W_dec, *transpose, True, True, True),
        "sae_backward": (
            *(x, W_enc, theta, 8.0, W_dec, whole(2, 6, 12), [16, 40], *entries, gate),
            *(d_values, d_gate, *transpose, True),
        ),
        "pre_at": (x, W_enc, b_enc, rows, latents),
        "by_feature": (offsets, indices, 40),
        "adam_step_": (W_dec, _adam_state(W_dec), whole(40, 12), rates, rule),
        "fused_sparse_step": (
            *(x, W_enc, theta, 8.0, W_dec, whole(2, 6, 12), [16, 40], *entries, gate),
            *(d_values, d_gate, *transpose, _adam_state(W_enc.t()), _adam_state(W_dec)),
            *(rates, rates, rule, rule),
        ),
    }
    return samples[name]


def _adam_state(rows: Tensor) -> list[Tensor]:
    """State of Adam without a first moment before the first step."""
    absent, steps = rows.new_empty(0), torch.zeros(len(rows), dtype=torch.int64)
    return [absent, torch.zeros_like(rows), absent.to(torch.uint8), steps.to(rows.device)]


# the machine


def _versions() -> dict[str, str]:
    return {
        "gemmascope_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": importlib.import_module("triton").__version__
        if triton_launchers.FOUND
        else "absent",
    }


def _cpu() -> dict[str, Any]:
    flags = _cpu_flags()
    shown = [f for f in sorted(flags) if f in SIMD_FLAGS["avx512"] or "vnni" in f or "amx" in f]
    return {
        "machine": platform.machine(),
        "features": shown,
        "simd_target": simd_target(flags),
        "threads": torch.get_num_threads(),
    }


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


def _environment() -> dict[str, str]:
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("GEMMASCOPE_FAST_")}


# text


def as_text(found: dict[str, Any]) -> str:
    """Lay out a report as plain text."""
    cpu, build = found["cpu"], found["build"]
    lines = [_pairs(found["versions"])]
    lines.append(
        f"cpu: {cpu['machine']}, {cpu['threads']} threads, SIMD target {cpu['simd_target']}"
    )
    lines.append(f"cpu features: {' '.join(cpu['features']) or 'none known'}")
    lines.append("build: " + ("not built" if build is None else _pairs(build)))
    lines.append("environment: " + (_pairs(found["environment"]) or "nothing set"))
    lines += ["", f"{'op':18}" + "".join(f"{device:22}" for device in DEVICES).rstrip()]
    for name, devices in found["ops"].items():
        lines.append(
            f"{name:18}" + "".join(f"{_cell(row):22}" for row in devices.values()).rstrip()
        )
    lines += ["", *_reasons(found["ops"])]
    failed = failures(found)
    lines += ["", *(f"FAILED {text}" for text in failed)] if failed else []
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    def shown(v: Any) -> str:
        return (",".join(v) if isinstance(v, list) else str(v)) or "none"

    return "  ".join(f"{k} {shown(v)}" for k, v in values.items())


def _cell(row: dict[str, Any]) -> str:
    verdict = row["self_test"] if row["self_test"] in ("pass", "") else "FAIL"
    return f"{row['implementation']} {verdict}"


def _reasons(rows: dict[str, Any]) -> list[str]:
    """One line per device, implementation and reason, naming the ops it holds for."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for name, devices in rows.items():
        for device, row in devices.items():
            for implementation, reason in row["why_not"].items():
                grouped.setdefault((device, implementation, reason), []).append(name)
    return [
        f"not {implementation} on {device}: {reason}"
        + ("" if len(names) == len(rows) else f" ({', '.join(names)})")
        for (device, implementation, reason), names in sorted(grouped.items())
    ]
