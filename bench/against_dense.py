"""Sparse ops against dense fp32 PyTorch on this CPU: time, fraction of the floor, peak memory.

    python bench/against_dense.py [--n 256 --d 1152 --d-sae 65536 --l0 64] [--json FILE]

Work: JumpReLU encode + decode (inference), and forward + backward with all five gradients. Both
contenders run interleaved in one process, medians are reported; correctness is asserted first.
Floors: the encoder product's FLOPs over the rate of a large fp32 matmul, and the compulsory bytes
(weights once; gradients written once when training) over the rate of a large copy, both measured
here. Peak memory: growth of the resident set over the state before the call, in a process of its
own. glibc's malloc keeps freed blocks, so that no contender pays for page faults.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import ops

BANDWIDTH = 0.02


class Gate(torch.autograd.Function):
    """Dense JumpReLU with the rectangle pseudo-derivative."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < BANDWIDTH / 2
        d_threshold = torch.where(window, grad, 0.0).sum(0) * (threshold / -BANDWIDTH)
        return torch.where(pre > threshold, grad, 0.0), d_threshold


def problem(args: argparse.Namespace) -> tuple[Tensor, gsf.SAE]:
    """Random x and a dictionary whose thresholds give the wanted mean L0."""
    torch.manual_seed(0)
    x = torch.randn(args.n, args.d)
    sae = gsf.SAE(args.d, args.d_sae, gsf.JumpReLU(bandwidth=BANDWIDTH))
    with torch.no_grad():
        sample = (x[:32] @ sae.W_enc).flatten()
        kept = max(1, round(args.l0 * 32))
        sae.threshold.fill_(float(sample.topk(kept).values[-1]))
    return x, sae


def dense_inference(x: Tensor, sae: gsf.SAE) -> Tensor:
    with torch.no_grad():
        pre = torch.addmm(sae.b_enc, x, sae.W_enc)
        acts = torch.where(pre > sae.threshold, pre, 0.0)
        return torch.addmm(sae.b_dec, acts, sae.W_dec)


def sparse_inference(x: Tensor, sae: gsf.SAE) -> Tensor:
    with torch.no_grad():
        return sae(x)


def dense_training(x: Tensor, sae: gsf.SAE) -> Tensor:
    pre = torch.addmm(sae.b_enc, x, sae.W_enc)
    recon = torch.addmm(sae.b_dec, Gate.apply(pre, sae.threshold), sae.W_dec)
    return _finish((recon - x).square().sum(-1).mean(), sae)


def sparse_training(x: Tensor, sae: gsf.SAE) -> Tensor:
    return _finish((sae(x) - x).square().sum(-1).mean(), sae)


def fused_training(x: Tensor, sae: gsf.SAE) -> Tensor:
    return _finish(sae.loss(x)[0], sae)


def _finish(loss: Tensor, sae: gsf.SAE) -> Tensor:
    sae.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


WORK: dict[str, dict[str, Callable[[Tensor, gsf.SAE], Tensor]]] = {
    "encode+decode": {"dense": dense_inference, "sparse": sparse_inference},
    "forward+backward": {
        "dense": dense_training,
        "sparse (composed ops)": sparse_training,
        "sparse (module.loss)": fused_training,
    },
}


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of every size: no contender pays for page faults at each step.

    `M_MMAP_MAX = 0`, for the highest threshold of `mmap` is 32 MiB and matrices have hundreds.
    """
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(-4, 0) and libc.mallopt(-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        raise RuntimeError("mallopt refused: page faults would be part of the timings")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large fp32 matmul and bytes/s of a large copy, best of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    flops = 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5))
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return flops, rate


def peak_megabytes(work: str, contender: str, args: argparse.Namespace) -> float:
    """Growth of the resident set during one call, in a fresh process."""
    command = [sys.executable, __file__, "--peak", work, contender]
    for name in ("n", "d", "d_sae", "l0"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_peak(args: argparse.Namespace) -> None:
    x, sae = problem(args)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kilobytes("VmRSS")
    WORK[args.peak[0]][args.peak[1]](x, sae)
    print((_status_kilobytes("VmHWM") - before) / 1024)


def _status_kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def assert_equal_results(
    x: Tensor, sae: gsf.SAE, contenders: dict[str, Callable[[Tensor, gsf.SAE], Tensor]]
) -> None:
    """Every contender's result and gradients agree with dense PyTorch's."""
    expected: list[Tensor] = []
    for name, run in contenders.items():
        sae.zero_grad(set_to_none=True)
        found = [run(x, sae)] + [p.grad for p in sae.parameters() if p.grad is not None]
        expected = expected or found
        for ours, theirs in zip(found, expected, strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * scale, msg=name)
    sae.zero_grad(set_to_none=True)


def measure(work: str, args: argparse.Namespace, rates: tuple[float, float]) -> list[dict]:
    x, sae = problem(args)
    with torch.no_grad():
        nnz = sae.encode(x).nnz
    contenders = WORK[work]
    assert_equal_results(x, sae, contenders)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            times[name].append(seconds(lambda run=run: run(x, sae)))
    weights = 2 * args.d * args.d_sae * 4
    floor = max(
        2 * args.n * args.d * args.d_sae / rates[0],
        weights * (1 if work == "encode+decode" else 2) / rates[1],
    )
    rows = []
    for name, samples in times.items():
        median = statistics.median(samples)
        rows.append(
            {
                "work": work,
                "contender": name,
                "median_s": median,
                "min_s": min(samples),
                "max_s": max(samples),
                "fraction_of_floor": floor / median,
                "speedup": statistics.median(times["dense"]) / median,
                "peak_mb": peak_megabytes(work, name, args),
                "nnz": nnz,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--d", type=int, default=1152)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--l0", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.peak:
        report_peak(args)
        return
    rates = ceilings()
    rows = [row for work in WORK for row in measure(work, args, rates)]
    print(
        f"n={args.n} d={args.d} d_sae={args.d_sae} L0={args.l0}, {torch.get_num_threads()} threads"
    )
    print(f"ceilings: {rates[0] / 1e9:.0f} GFLOP/s fp32 matmul, {rates[1] / 1e9:.1f} GB/s copy")
    for row in rows:
        print(
            f"{row['work']:<17} {row['contender']:<22} {1e3 * row['median_s']:8.1f} ms "
            f"(min {1e3 * row['min_s']:.1f})  {row['speedup']:5.2f}x  "
            f"{100 * row['fraction_of_floor']:3.0f} % of floor  {row['peak_mb']:7.1f} MB"
        )
    if args.json:
        report = {
            "arguments": {k: getattr(args, k) for k in ("n", "d", "d_sae", "l0", "rounds")},
            "machine": machine(),
            "ceilings": {"flops": rates[0], "bytes_per_s": rates[1]},
            "results": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What a result depends on beside its arguments."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "implementation": ops.implementation("jumprelu_encode", "cpu"),
        "commit": commit,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
