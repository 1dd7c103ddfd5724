"""A training step with its optimizer: fused and unfused gsf.optim.Adam against dense PyTorch.

    python bench/bench_step.py [--n 1024 --d 1152 --d-sae 65536 --l0 64 --repeats 3] [--json FILE]

Contenders, interleaved in one process, medians: encode, decode, loss, backward and update with
`Adam(fused=True)`, the same unfused, and dense autograd with `torch.optim.Adam(fused=True)`.
Float32 floor: the encoder product's FLOPs over the rate of a large float32 matmul, plus the touched
rows' weights and moments, read and written, over the rate of a large copy, both measured here; an
encoder that screens by int8 products goes below it. glibc's malloc keeps freed blocks while the
steps are timed, so that no contender pays for page faults. Peak memory: growth of the resident set
during one step beyond the state before it, each contender in a process of its own (malloc as it
comes), after a first step made the states.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from against_dense import BANDWIDTH, Gate, keep_freed_memory, machine, problem

import gemmascope_fast as gsf

LAMBDA = 1e-3
CONTENDERS = ("fused", "unfused", "dense")
SIZES = ("n", "d", "d_sae", "l0", "moments")
BETAS = (0.0, 0.999)

Step = Callable[[], float]
Floor = tuple[float, float, int]


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


def dense_loss(sae: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same by dense autograd, for any module with the parameters of a JumpReLU SAE."""
    pre = torch.addmm(sae.b_enc, x, sae.W_enc)
    recon = torch.addmm(sae.b_dec, Gate.apply(pre, sae.threshold), sae.W_dec)
    l0 = L0Gate.apply(pre, sae.threshold).sum(-1).mean()
    return (recon - x).square().sum(-1).mean() + LAMBDA * l0


def contender(name: str, args: argparse.Namespace) -> Step:
    x, sae = problem(args)
    if name == "dense":
        optimizer = torch.optim.Adam(sae.parameters(), args.lr, betas=BETAS, fused=True)
    else:
        options = {"moments": args.moments, "fused": name == "fused"}
        optimizer = gsf.optim.Adam(sae, args.lr, **options)
    evaluate = dense_loss if name == "dense" else sparse_loss
    return training_step(optimizer, lambda batch: evaluate(sae, batch), x)


def training_step(
    optimizer: torch.optim.Optimizer,
    evaluate: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> Step:
    """One training step; every call takes another batch of the same kind and returns its loss."""
    following = batches(x)

    def step() -> float:
        optimizer.zero_grad()
        value = evaluate(following())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def batches(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """X in three arrangements, in turns; x itself first."""
    arranged = [x, x.flip(0).contiguous(), x.roll(1, 1)]
    count = -1

    def following() -> torch.Tensor:
        nonlocal count
        count += 1
        return arranged[count % len(arranged)]

    return following


def interleaved(
    steps: dict[str, Step], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses of every step, the first included, and milliseconds of those after the first."""
    losses = {name: [step()] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name].append(step())
            times[name].append(1e3 * (time.perf_counter() - start))
    return losses, times


def peak_mebibytes(
    script: str,
    name: str,
    args: argparse.Namespace,
    options: Iterable[str],
    flags: Iterable[str] = (),
) -> float:
    """`--peak-of name` of the script, in a process of its own."""
    command = [sys.executable, script, "--peak-of", name, *flags]
    for option in options:
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(step: Step) -> None:
    """Print the growth of the resident set during a second step."""
    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # reset the high-water mark
    status = Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0])
    step()
    after = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print((after - before) / 1024)


def rates(repeats: int = 8) -> tuple[float, float]:
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


def floor_ms(args: argparse.Namespace, x: torch.Tensor, sae: gsf.SAE) -> Floor:
    """Encoder product, update of the touched rows, and how many rows those are."""
    touched = int(sae.encode(x).fired().sum())
    flops, bytes_per_second = rates()
    product = 2 * args.n * args.d * args.d_sae / flops
    moment = 4 if args.moments == "fp32" else 1
    moved = 2 * touched * args.d * 2 * (4 + moment)
    return 1e3 * product, 1e3 * moved / bytes_per_second, touched


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark of a training step."""
    made = argparse.ArgumentParser(description=description)
    for name, default in (("n", 1024), ("d", 1152), ("d-sae", 65536), ("l0", 64), ("repeats", 3)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--lr", type=float, default=1e-5)
    made.add_argument("--moments", default="fp32")
    made.add_argument("--json", type=Path)
    made.add_argument("--no-peak", action="store_true", help="leave the peak memory out")
    made.add_argument("--peak-of", help=argparse.SUPPRESS)
    return made


def summary(
    args: argparse.Namespace,
    times: dict[str, list[float]],
    floor: Floor,
    peak: Callable[[str], float],
    baselines: tuple[str, ...] = ("dense",),
    **facts: Any,
) -> None:
    """Print one line per contender, and write all of it where asked."""
    product, update, touched = floor
    given = {k: v for k, v in vars(args).items() if k not in ("json", "peak_of", "no_peak")}
    report: dict[str, Any] = {"machine": machine(), "arguments": given, **facts}
    report |= {"floor_product_ms": product, "floor_update_ms": update, "touched": touched}
    print(
        f"float32 floor: encoder product {product:.0f} ms + update of {touched} latents "
        f"{update:.0f} ms"
    )
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    matrix = args.n * args.d_sae * 4 / 2**20
    for name, samples in times.items():
        row: dict[str, Any] = {"ms": samples, "median_ms": medians[name]}
        row["fraction_of_floor"] = (product + update) / medians[name]
        line = f"{name:24} {medians[name]:8.0f} ms (min {min(samples):.0f}, max {max(samples):.0f})"
        for other in baselines:
            if other in medians:
                row[f"times_{other}"] = medians[other] / medians[name]
                line += f" {row[f'times_{other}']:6.2f}x of {other},"
        line += f" {100 * row['fraction_of_floor']:.0f} % of the float32 floor"
        if not args.no_peak:
            row["peak_mib"] = peak(name)
            line += f", peak {row['peak_mib']:.0f} MiB = {row['peak_mib'] / matrix:.3f} n*F"
        report[name] = row
        print(line, flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--no-dense", action="store_true", help="leave the dense contender out")
    args = options.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if args.peak_of:
        print_peak(contender(args.peak_of, args))
        return
    keep_freed_memory()
    names = CONTENDERS[:2] if args.no_dense else CONTENDERS
    floor = floor_ms(args, *problem(args))
    losses, times = interleaved({name: contender(name, args) for name in names}, args.repeats)
    assert losses["fused"] == losses["unfused"], "fused and unfused steps must agree to the bit"
    for name in names:
        torch.testing.assert_close(
            torch.tensor(losses[name]), torch.tensor(losses["unfused"]), rtol=1e-3, atol=0
        )
    summary(args, times, floor, lambda name: peak_mebibytes(__file__, name, args, SIZES))


if __name__ == "__main__":
    main()
