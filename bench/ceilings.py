"""What this machine can do, measured between the rounds of every case: the floors' denominators.

A ceiling is a function of the round that returns a rate per second, with all threads:

    int8 tile      operations of the screening tile on operands in L1
    fp32 unit      floating-point operations of fused multiply-adds on registers
    fp32 matmul    of a large `torch.mm`
    read, copy     bytes of a large sum; of a large copy, read and written
    random rows    bytes of random rows of a matrix, at the best of four prefetch distances
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemmascope_fast import _testing

Ceiling = Callable[[int], float]

ROWS = 32_768
AHEAD = (4, 8, 16, 24)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def on_all_threads(work: Callable[[int], object]) -> float:
    """Seconds that `work(i)` takes on all of torch's threads at once."""
    others = range(1, torch.get_num_threads())
    threads = [threading.Thread(target=work, args=(i,)) for i in others]

    def run() -> None:
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()

    return seconds(run)


def int8_tile(_: int) -> float:
    return float(_testing.screen_rate(_testing.simd_target(), torch.get_num_threads()))


def fp32_unit(_: int) -> float:
    rounds = 2_000_000
    taken = on_all_threads(lambda _: compiled().multiply_add(rounds, 0.5, 0.25))
    return 2 * 12 * 16 * rounds * torch.get_num_threads() / taken


def fp32_matmul(_: int) -> float:
    a, b, out = _matrices()
    return 2 * a.shape[0] * b.numel() / seconds(lambda: torch.mm(a, b, out=out))


def read(_: int) -> float:
    source, _target = _large()
    return source.nbytes / seconds(source.sum)


def copy(_: int) -> float:
    source, target = _large()
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def random_rows(matrices: Sequence[Tensor]) -> Ceiling:
    """Ceiling over `matrices [rows, columns]` of one shape, in turns; rows of 64-byte lines."""
    rows, columns = matrices[0].shape
    size = columns * matrices[0].element_size()
    if size % 64:
        raise ValueError(f"random_rows: rows must be whole 64-byte lines, got {size} bytes")
    drawn = [torch.randint(rows, (ROWS,), dtype=torch.int32) for _ in range(4)]
    share = ROWS // torch.get_num_threads()

    def rate(turn: int) -> float:
        best = 0.0
        for shift, ahead in enumerate(AHEAD):
            base = matrices[(turn + shift) % len(matrices)].data_ptr()
            indices = drawn[(turn + shift) % len(drawn)]

            def part(i: int, base: int = base, indices: Tensor = indices, far: int = ahead) -> None:
                start = indices[i * share :].data_ptr()
                compiled().random_rows(base, start, share, size, far)

            moved = share * torch.get_num_threads() * size
            best = max(best, moved / on_all_threads(part))
        return best

    return rate


@functools.cache
def compiled() -> ctypes.CDLL:
    """`ceilings.c`, compiled for this processor; calls release the interpreter's lock."""
    source = Path(__file__).with_name("ceilings.c")
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/ceilings.so"
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["cc", *options, str(source), "-o", built], check=True)
        library = ctypes.CDLL(built)
    library.random_rows.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
    library.multiply_add.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_float]
    library.random_rows.restype = library.multiply_add.restype = ctypes.c_float
    return library


@functools.cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(256, 4096), torch.randn(4096, 4096), torch.empty(256, 4096)


@functools.cache
def _large() -> tuple[Tensor, Tensor]:
    source = torch.randn(32 << 20)
    return source, torch.empty_like(source)
