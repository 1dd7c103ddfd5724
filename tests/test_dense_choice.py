"""When compiled CUDA kernels hand an op to Triton, whose dense products are faster there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import DTYPES, HANDED_OVER
from torch import Tensor

from gemmascope_fast import ops, triton_launchers

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import dense, launching

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOKENS, LATENTS = False, True
OFFERED = torch._C._dispatch_has_kernel(f"{ops.TRITON}::set_rates")
needs_cuda_build = pytest.mark.skipif(not OFFERED, reason="the library is built without CUDA")

# ---- when


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


SHAPES = [
    (capacity, n, F, d)
    for n, F, d in itertools.product(
        (0, 1, 7, 8192, 10**6), (0, 1, 1024, 16384, 262144), (1, 640, 5376)
    )
    for capacity in (0, n + 5, 64 * n)
]


def both_sums(
    by_latent: bool, shape: tuple[int, ...], matrix: torch.dtype, result: torch.dtype
) -> tuple[Any, dense.Work]:
    capacity, n, F, d = shape
    ours = testing.sum_work(by_latent, capacity, n, F, d, CODES[matrix], CODES[result])
    return ours, dense.sum_work(capacity, n, meta(F, d, dtype=matrix), result)


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_costs_are_those_of_the_python_model(first: torch.dtype, second: torch.dtype) -> None:
    for capacity, n, F, d in SHAPES:
        W, g = meta(F, d, dtype=first), meta(n, d, dtype=second)
        dots = testing.dots_work(capacity, n, F, d, CODES[first], CODES[second])
        for ours, theirs in (
            both_sums(TOKENS, (capacity, n, F, d), first, second),
            (dots, dense.dots_work(capacity, W, g)),
        ):
            for field in ("gathered", "moved", "operations", "wide"):
                assert getattr(ours, field) == getattr(theirs, field), (capacity, n, F, d, field)


def test_constants_are_those_of_the_python_model() -> None:
    assert testing.DENSE_MARGIN == dense.MARGIN
    assert testing.DENSE_CHUNK_BYTES == dense.CHUNK_BYTES
    assert testing.DENSE_LARGEST_MATRIX == dense.LARGEST_MATRIX


def rates(architecture: int) -> dict[str, int]:
    return launching.table("dense")[f"sm_{architecture}"][0]["config"]


def expected(works: list[tuple[bool, dense.Work]], architecture: int) -> bool:
    row, passes, products = rates(architecture), 0.0, 0.0
    for by_latent, work in works:
        native = row[f"NATIVE_{'LATENT' if by_latent else 'TOKEN'}_GIGABYTES"]
        rate = row["TERAFLOPS_32" if work.wide else "TERAFLOPS_16"]
        passes += work.gathered / (native * 1e9)
        products += work.moved / (row["GIGABYTES"] * 1e9) + work.operations / (rate * 1e12)
        products += testing.DENSE_SECONDS
    return passes > dense.MARGIN * products


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_products_are_chosen_by_the_rates_of_the_table(architecture: int) -> None:
    table, outcomes = triton_launchers.dense_rates(), set()
    for n, F, per_token, dtype, result in itertools.product(
        (64, 8192), (1024, 4096, 65536), (16, 64, 256, 1024, 4096), DTYPES, DTYPES
    ):
        shape = (n * per_token, n, F, 5376)
        pairs = [(walk, both_sums(walk, shape, dtype, result)) for walk in (TOKENS, LATENTS)]
        for chosen in (pairs[:1], pairs[1:], pairs):
            found = testing.dense_pays(table, architecture, [ours for _, (ours, _) in chosen])
            assert found is expected([(walk, work) for walk, (_, work) in chosen], architecture)
            outcomes.add(found)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("F", "dtype", "few", "many"),
    [
        (1024, torch.bfloat16, 95, 105),
        (4096, torch.bfloat16, 230, 255),
        (16384, torch.bfloat16, 790, 850),
        (4096, torch.float32, 570, 610),
    ],
)
def test_decode_is_dense_from_so_many_entries_per_token(
    F: int, dtype: torch.dtype, few: int, many: int
) -> None:
    for per_token, wanted in ((few, False), (many, True)):
        work, _ = both_sums(TOKENS, (8192 * per_token, 8192, F, 5376), dtype, dtype)
        assert testing.dense_pays(triton_launchers.dense_rates(), 90, [work]) is wanted


@pytest.mark.parametrize("architecture", [75, 80, 86, 90, 100, 103, 120, 121])
def test_the_newest_rates_that_are_not_newer_serve(architecture: int) -> None:
    """As `launching.choose` does: rates of one row alone make the pass slow."""
    names = [0, 80, 90, 120]
    targets = {f"sm_{name}" if name else "default": [{"at": name}] for name in names}
    wanted = launching._rows(targets, f"sm_{architecture}")[0]["at"]
    work, _ = both_sums(TOKENS, (8192 * 64, 8192, 1024, 640), torch.bfloat16, torch.bfloat16)
    for slow in names:
        table = [v for name in names for v in (name, 1, 1, 1, 1e-9 if name == slow else 1e9, 1e9)]
        assert testing.dense_pays(table, architecture, [work]) is (slow == wanted)


ALWAYS = [0.0, 1.0, 1.0, 1.0, 1e-12, 1e-12]
"""Rates of a device whose passes are slower than anything."""


def test_what_is_never_multiplied_densely() -> None:
    def pays(*shapes: tuple[int, int, int, int]) -> bool:
        works = [both_sums(TOKENS, s, torch.bfloat16, torch.bfloat16)[0] for s in shapes]
        return testing.dense_pays(ALWAYS, 90, works)

    assert pays((64, 8, 16, 16))
    assert not pays((0, 8, 16, 16)), "no entries"
    assert not pays((64, 8, 16, 16), (64, 0, 16, 16)), "no rows"
    assert not pays((64, 8, 0, 16)) and not pays((64, 8, 16, 0)) and not pays()
    assert pays((64, 8, 2**17, 2**12)) and not pays((64, 8, 2**17 + 1, 2**12)), "copies too large"


def test_the_launches_of_a_product_are_not_worth_it_for_a_short_pass() -> None:
    table = triton_launchers.dense_rates()
    for n, wanted in ((64, False), (8192, True)):
        work, _ = both_sums(LATENTS, (512 * n, n, 1024, 640), torch.bfloat16, torch.bfloat16)
        assert testing.dense_pays(table, 90, [work]) is wanted


@pytest.mark.parametrize("numbers", [[], [0.0] * 5, [0.0] * 13, [90.0] + [1.0] * 5])
def test_a_table_of_rates_has_rows_of_six_numbers(numbers: list[float]) -> None:
    with pytest.raises(RuntimeError, match="set_rates: expected rows of 6 numbers, the first for"):
        testing.dense_pays(numbers, 90, [])
    if numbers and OFFERED:
        with pytest.raises(RuntimeError):
            torch.ops.gemmascope_fast_triton.set_rates(numbers)


# ---- registration

OFFER = f"""
import sys, torch
from gemmascope_fast import ops
offered = [n for n in ops.TABLE if torch._C._dispatch_has_kernel("{ops.TRITON}::" + n)]
on_cuda = [n for n in offered
           if torch._C._dispatch_has_kernel_for_dispatch_key("{ops.TRITON}::" + n, "CUDA")]
assert offered == on_cuda
print(set({HANDED_OVER}) <= set(offered), len(offered), "triton" in sys.modules)
print({{ops.implementation(n, "cuda") for n in offered}})
"""
NO_TRITON = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
"""


@needs_cuda_build
def test_launchers_are_offered_without_serving(run_python: Callable[..., str]) -> None:
    offered = run_python(OFFER, GEMMASCOPE_FAST_BACKEND="").splitlines()
    assert offered[0].startswith("True ") and offered[0].endswith(" False")
    assert offered[1] == "{'native'}"


@needs_cuda_build
@pytest.mark.parametrize(
    ("before", "backend"), [(NO_TRITON, ""), ("", "native"), ("", "reference"), ("", "triton")]
)
def test_nothing_is_offered_without_triton_or_with_a_forced_backend(
    before: str, backend: str, run_python: Callable[..., str]
) -> None:
    out = run_python(before + OFFER, GEMMASCOPE_FAST_BACKEND=backend, TRITON_INTERPRET="")
    assert out == "False 0 False\nset()"


def test_the_rates_are_those_of_the_table() -> None:
    numbers, rows = triton_launchers.dense_rates(), {}
    for at in range(0, len(numbers), 6):
        rows[int(numbers[at])] = numbers[at + 1 : at + 6]
    assert list(rows)[0] == 0 and {80, 90} < set(rows)
    for architecture in set(rows) - {0}:
        named = rates(architecture)
        assert rows[architecture] == [named[rate] for rate in triton_launchers.RATES]
    assert len(triton_launchers.RATES) == 5
