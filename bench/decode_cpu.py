"""Decode and the sparse backward passes on the CPU, against peers and the ceiling of random rows.

    python bench/decode_cpu.py [--json bench/results/decode_cpu.json] [--rounds 11]

d = 1152, d_sae = 65,536, L0 = 64. Decode at n = 256 and 1024, fp32 and bf16 weights, three
distributions of the latents (uniform, log-normal with sigma = 2, clusters of 16 tokens that share
most of theirs), beside `embedding_bag(mode="sum", per_sample_weights=...)` and, in fp32, the dense
product. Contenders interleaved in one process, medians, cold rows: two dictionaries of 302 MB and
four batches in rotation. Freed memory is kept, so that page faults are nobody's time.

Floors: decode, the distinct rows once; a backward pass, each touched latent's rows of weights,
moments and gradients once. Both at the ceiling: the best rate, over prefetch distances, at which
`bench/random_rows.c` streams random rows of that size with all threads.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gemmascope_fast  # noqa: F401  registers the ops

D, D_SAE, L0, BANDWIDTH = 1152, 65_536, 64, 0.1
OPS = torch.ops.gemmascope_fast
Batch = tuple[Tensor, Tensor, Tensor]  # offsets, indices, values


def latents(kind: str, n: int) -> Tensor:
    """`[n, L0]` distinct ascending latents per token."""
    if kind == "clustered":
        rows = []
        for token in range(n):
            if token % 16 == 0:
                pool = torch.randperm(D_SAE)[: 2 * L0]
            shared = pool[torch.randperm(2 * L0)[: L0 * 3 // 4]]
            own = torch.randint(D_SAE, (2 * L0,))
            own = own[~torch.isin(own, shared)].unique()
            own = own[torch.randperm(len(own))[: L0 - len(shared)]]
            rows.append(torch.cat([shared, own]))
        return torch.stack(rows).sort(1).values
    rates = torch.ones(D_SAE) if kind == "uniform" else torch.exp(2 * torch.randn(D_SAE))
    return torch.multinomial(rates.expand(n, D_SAE), L0).sort(1).values


def batch(kind: str, n: int) -> Batch:
    indices = latents(kind, n).reshape(-1).to(torch.int32)
    return torch.arange(0, n * L0 + 1, L0), indices, torch.rand(n * L0) + 0.5


def interleave(
    contenders: dict[str, Callable[[int], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every call; the two rounds before them are not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for at in range(-2, rounds):
        for shift, (name, run) in enumerate(contenders.items()):
            start = time.perf_counter()
            run(at + 2 + shift)  # the next contender takes other rows
            if at >= 0:
                times[name].append(time.perf_counter() - start)
    return times


class Ceiling:
    """Bytes per second of random rows, all threads; compiled here."""

    def __init__(self, folder: str) -> None:
        source, library = Path(__file__).with_name("random_rows.c"), f"{folder}/random_rows.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", library]
        subprocess.run(command, check=True)
        self.stream = ctypes.CDLL(library).random_rows
        self.stream.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
        self.stream.restype = ctypes.c_float
        self.indices = [torch.randint(D_SAE, (32_768,), dtype=torch.int32) for _ in range(4)]

    def run(self, W: Tensor, at: int, ahead: int) -> None:
        indices, workers = self.indices[at % 4], torch.get_num_threads()
        size = len(indices) // workers
        row = W.shape[1] * W.element_size()

        def part(i: int) -> None:
            self.stream(W.data_ptr(), indices[i * size :].data_ptr(), size, row, ahead)

        threads = [threading.Thread(target=part, args=(i,)) for i in range(1, workers)]
        for thread in threads:
            thread.start()
        part(0)
        for thread in threads:
            thread.join()

    def rate(self, dictionaries: list[Tensor], rounds: int) -> float:
        runs = {
            str(ahead): lambda at, ahead=ahead: self.run(dictionaries[at % 2], at, ahead)
            for ahead in (4, 8, 16, 24)
        }
        times = interleave(runs, rounds)
        moved = 32_768 * dictionaries[0].shape[1] * dictionaries[0].element_size()
        return moved / min(statistics.median(t) for t in times.values())


def summary(times: dict[str, list[float]], floor: float) -> dict[str, dict[str, float]]:
    found = {}
    for name, samples in times.items():
        median = statistics.median(samples)
        found[name] = {
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(samples),
            "max_ms": 1e3 * max(samples),
            "of_floor": floor / median,
        }
    return found


def decode_case(
    kind: str, n: int, dictionaries: list[Tensor], ceiling: float, rounds: int
) -> dict[str, object]:
    """One distribution, batch size and dtype."""
    batches, bias = [batch(kind, n) for _ in range(4)], torch.randn(D)
    bags = [indices.long().view(n, L0) for _, indices, _ in batches]
    dtype = dictionaries[0].dtype
    weights = [values.to(dtype).view(n, L0) for _, _, values in batches]

    def ours(at: int) -> Tensor:
        return OPS.decode(*batches[at % 4], dictionaries[at % 2], bias, None, None, dtype)

    def bag(at: int) -> Tensor:
        W = dictionaries[at % 2]
        options = {"mode": "sum", "per_sample_weights": weights[at % 4]}
        sums = torch.nn.functional.embedding_bag(bags[at % 4], W, **options)
        return sums.add_(bias.to(dtype))

    torch.testing.assert_close(ours(0).float(), bag(0).float(), rtol=3e-2, atol=3e-1)
    times = interleave({"ours": ours, "embedding_bag": bag}, rounds)
    if dtype == torch.float32 and kind == "uniform":
        acts = torch.zeros(n, D_SAE).scatter_(1, bags[0], weights[0])
        torch.testing.assert_close(ours(0), torch.addmm(bias, acts, dictionaries[0]))
        dense = {"dense": lambda at: torch.addmm(bias, acts, dictionaries[at % 2])}
        times |= interleave(dense | {"ours beside it": ours}, 3)
    distinct = statistics.median(len(indices.unique()) for _, indices, _ in batches)
    itemsize = dictionaries[0].element_size()
    moved = (distinct + n) * D * itemsize
    return {
        "op": "decode",
        "n": n,
        "dtype": str(dtype),
        "latents": kind,
        "distinct_rows": distinct,
        "flops": 2 * n * L0 * D,
        "bytes": moved,
        "bytes_with_repeats": n * (L0 + 1) * D * itemsize,
        "results": summary(times, moved / ceiling),
    }


def adam_state(rows: Tensor) -> list[Tensor]:
    empty = torch.empty(0)
    steps = torch.zeros(len(rows), dtype=torch.int64)
    return [empty, torch.rand(rows.shape), empty.to(torch.uint8), steps]


def backward_cases(
    n: int, dictionaries: list[Tensor], ceiling: float, rounds: int
) -> list[dict[str, object]]:
    """Every backward pass and the fused step on uniform entries, a tenth of them window entries."""
    W_dec, W_enc = dictionaries[0], dictionaries[1].t()
    x, d_recon, threshold = torch.randn(n, D), torch.randn(n, D), torch.rand(D_SAE)
    offsets, indices, values = batch("uniform", n)
    gate = (torch.rand(n * L0) > 0.1).float()
    values *= gate
    entries, gated = (offsets, indices, values), (offsets, indices, values, gate)
    view = OPS.by_feature(offsets, indices, D_SAE)
    d_values, d_gate = torch.randn(n * L0), torch.randn(n * L0)
    states, steps = [adam_state(W_dec), adam_state(W_dec)], iter(range(1, 10**6))
    rates = [1e-5, 0.0, 0.999, 1e-8]

    def fused(at: int) -> object:
        rules = [[next(steps), 0, 0, 0, seed] for seed in (1, 2)]
        passed = (x, W_enc, threshold, BANDWIDTH, W_dec, d_recon[None], [D_SAE], *gated, None)
        return OPS.fused_sparse_step(*passed, d_gate, *view, *states, rates, rates, *rules)

    def sae(at: int) -> object:
        passed = (x, W_enc, threshold, BANDWIDTH, W_dec, d_recon[None], [D_SAE], *gated, None)
        return OPS.sae_backward(*passed, d_gate, *view, False)

    def encode(at: int) -> object:
        passed = (d_values, d_gate, x, W_enc, threshold, BANDWIDTH, *gated, *view)
        return OPS.encode_backward(*passed, True, True, True, True)

    def decode(at: int) -> object:
        return OPS.decode_backward(d_recon, *entries, W_dec, *view, True, True, True)

    def decode_values(at: int) -> object:
        return OPS.decode_backward(d_recon, *entries, W_dec, *view, True, False, False)

    runs = {
        "decode_backward, values alone": (decode_values, 1),
        "decode_backward": (decode, 2),
        "encode_backward": (encode, 2),
        "sae_backward": (sae, 3),
        "fused_sparse_step": (fused, 8),
    }
    times = interleave({name: run for name, (run, _) in runs.items()}, rounds)
    touched = len(indices.unique())
    return [
        {
            "op": name,
            "n": n,
            "dtype": "torch.float32",
            "latents": "uniform",
            "touched": touched,
            "bytes": rows * touched * D * 4 + 2 * n * D * 4,
            "results": summary({"ours": times[name]}, rows * touched * D * 4 / ceiling),
        }
        for name, (_, rows) in runs.items()
    ]


def measure(rounds: int, folder: str) -> dict[str, object]:
    ceiling, cases, rates = Ceiling(folder), [], {}
    dictionaries = [torch.randn(D_SAE, D) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        cast = [W.to(dtype) for W in dictionaries]
        rate = ceiling.rate(cast, 7)
        for n in (256, 1024):
            for kind in ("uniform", "lognormal", "clustered"):
                cases.append(decode_case(kind, n, cast, rate, rounds))
        if dtype == torch.float32:
            cases += backward_cases(1024, cast, rate, rounds)
        rates[str(dtype)] = max(rate, ceiling.rate(cast, 7))
    return {"random_rows_bytes_per_s": rates, "cases": cases}


def print_case(case: dict) -> None:
    label = f"{case['op']:30} n = {case['n']:4} {case['dtype'][6:]:8} {case['latents']:9}"
    for name, found in case["results"].items():
        beside = "ours beside it" if name == "dense" else "ours"  # what it alternated with
        ratio = found["median_ms"] / case["results"][beside]["median_ms"]
        print(
            f"{label} {name:14} {found['median_ms']:8.2f} ms (min {found['min_ms']:.2f}, max "
            f"{found['max_ms']:.2f})  {100 * found['of_floor']:4.0f} % of the floor  {ratio:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(-4, 0) and libc.mallopt(-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        raise RuntimeError("mallopt refused: page faults would be part of the timings")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args.rounds, folder)
    cpuinfo = Path("/proc/cpuinfo").read_text()
    describe = ["git", "describe", "--always", "--dirty"]
    report["machine"] = {
        "processor": cpuinfo.split("model name", 1)[-1].split("\n")[0].strip("\t :"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "target": os.environ.get("GEMMASCOPE_FAST_CPU", "default"),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
    }
    for dtype, rate in report["random_rows_bytes_per_s"].items():
        print(f"random rows of {dtype}: {rate / 1e9:.1f} GB/s")
    for case in report["cases"]:
        print_case(case)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
