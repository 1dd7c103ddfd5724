"""A training step with its optimizer: fused and unfused gsf.optim.Adam against dense PyTorch.

    python bench/bench_step.py [--n 1024 --d 1152 --d-sae 65536 --l0 64 --repeats 3] [--json FILE]

Contenders, interleaved in one process, medians: encode, decode, loss, backward and update with
`Adam(fused=True)`, the same unfused, and dense autograd with `torch.optim.Adam(fused=True)`. The
update alone is timed on a frozen forward pass. Floor: the encoder product's FLOPs over the rate of
a large float32 matmul, plus the touched rows' weights and moments, read and written, over the rate
of a large copy, both measured here. Peak memory: growth of the resident set during one step beyond
the state before it, each contender in a process of its own, after a first step made the states.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from against_dense import BANDWIDTH, Gate, problem

import gemmascope_fast as gsf

LAMBDA = 1e-3
CONTENDERS = ("fused", "unfused", "dense")


def sparse_loss(sae: gsf.SAE, x: torch.Tensor) -> torch.Tensor:
    acts = sae.encode(x)
    return (sae.decode(acts) - x).square().sum(-1).mean() + LAMBDA * acts.l0().mean()


class L0Gate(torch.autograd.Function):
    """Active latents, with the rectangle pseudo-derivative in the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < BANDWIDTH / 2
        return None, torch.where(window, grad, 0.0).sum(0) / -BANDWIDTH


def dense_loss(sae: gsf.SAE, x: torch.Tensor) -> torch.Tensor:
    pre = torch.addmm(sae.b_enc, x, sae.W_enc)
    recon = torch.addmm(sae.b_dec, Gate.apply(pre, sae.threshold), sae.W_dec)
    l0 = L0Gate.apply(pre, sae.threshold).sum(-1).mean()
    return (recon - x).square().sum(-1).mean() + LAMBDA * l0


def contender(name: str, args: argparse.Namespace) -> Callable[[], float]:
    """One training step of a contender; every call takes a fresh batch of the same kind."""
    x, sae = problem(args)
    if name == "dense":
        optimizer = torch.optim.Adam(sae.parameters(), args.lr, betas=(0.0, 0.999), fused=True)
    else:
        options = {"moments": args.moments, "fused": name == "fused"}
        optimizer = gsf.optim.Adam(sae, args.lr, **options)
    evaluate = dense_loss if name == "dense" else sparse_loss
    batches = [x, x.flip(0).contiguous(), x.roll(1, 1)]
    count = 0

    def step() -> float:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        value = evaluate(sae, batches[count % len(batches)])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def peak_megabytes(args: argparse.Namespace, name: str) -> float:
    command = [sys.executable, __file__, "--peak-of", name]
    for option in ("n", "d", "d_sae", "l0", "moments"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(args: argparse.Namespace) -> None:
    step = contender(args.peak_of, args)
    step()
    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # reset the high-water mark
    status = Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0])
    step()
    after = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print((after - before) / 1024)


def rates(repeats: int = 3) -> tuple[float, float]:
    """FLOP/s of a large float32 matmul, bytes/s of a large copy."""
    a, b = torch.randn(1024, 4096), torch.randn(4096, 4096)
    big = torch.randn(64 << 20)
    other = torch.empty_like(big)
    best = [0.0, 0.0]
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best[0] = max(best[0], 2 * 1024 * 4096 * 4096 / (time.perf_counter() - start))
        start = time.perf_counter()
        other.copy_(big)
        best[1] = max(best[1], 2 * big.nbytes / (time.perf_counter() - start))
    return best[0], best[1]


def floor_ms(args: argparse.Namespace) -> tuple[float, float, int]:
    """Encoder product, update of the touched rows, and how many rows those are."""
    x, sae = problem(args)
    touched = int(sae.encode(x).fired().sum())
    flops, bytes_per_second = rates()
    product = 2 * args.n * args.d * args.d_sae / flops
    moment = 4 if args.moments == "fp32" else 1
    moved = 2 * touched * args.d * 2 * (4 + moment)
    return 1e3 * product, 1e3 * moved / bytes_per_second, touched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n", 1024), ("d", 1152), ("d-sae", 65536), ("l0", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--moments", default="fp32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--no-dense", action="store_true", help="leave the dense contender out")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if args.peak_of:
        print_peak(args)
        return
    names = CONTENDERS[:2] if args.no_dense else CONTENDERS
    product, update, touched = floor_ms(args)
    steps = {name: contender(name, args) for name in names}
    losses = {name: [step()] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name].append(step())
            times[name].append(1e3 * (time.perf_counter() - start))
    assert losses["fused"] == losses["unfused"], "fused and unfused steps must agree to the bit"
    for name in names:
        torch.testing.assert_close(
            torch.tensor(losses[name]), torch.tensor(losses["unfused"]), rtol=1e-3, atol=0
        )
    del steps
    report = {"threads": torch.get_num_threads(), "torch": torch.__version__, **vars(args)}
    report |= {"floor_product_ms": product, "floor_update_ms": update, "touched": touched}
    print(f"floor: encoder product {product:.0f} ms + update of {touched} latents {update:.0f} ms")
    matrix = args.n * args.d_sae * 4 / 2**20
    for name in names:
        median = statistics.median(times[name])
        peak = peak_megabytes(args, name)
        report[name] = {"ms": times[name], "median_ms": median, "peak_mib": peak}
        ratio = f"{statistics.median(times['dense']) / median:.2f}x" if "dense" in times else ""
        print(
            f"{name:8} {median:8.0f} ms (min {min(times[name]):.0f}, max {max(times[name]):.0f}) "
            f"{ratio:>7} of dense, {100 * (product + update) / median:.0f} % of the floor, "
            f"peak {peak:.0f} MiB = {peak / matrix:.3f} n*F"
        )
    if args.json:
        args.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
