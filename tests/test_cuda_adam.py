"""The CUDA optimizer run on the CPU (csrc/testing/cuda_on_cpu.h): its arithmetic, its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_all_same, assert_same
from samples import adam_state
from test_adam_step import FOREVER, RATES, run
from torch import Tensor

from gemmascope_fast import reference

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
pytest.importorskip("gemmascope_fast._C", reason="the native library is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLABS = 0
WAYS = (64, 128, 256, SLABS)
"""Threads of a block that takes a row, or rows in slabs."""
SPECIAL = [0.0, -0.0, 1.0, -3.3, 1e-45, 1e-39, 3e38, math.inf, -math.inf, math.nan, -math.nan]


def array(t: Tensor) -> np.ndarray:
    """The memory of `t`; 16-bit floats as their bits."""
    return t.view(torch.int16).numpy().view(np.uint16) if t.itemsize == 2 else t.numpy()


def matrix(weight: Tensor, state: list[Tensor], beta1: float) -> list[Any]:
    """What the bindings take as a matrix under Adam."""
    exp_avg, exp_avg_sq, exponents, touched_at = state
    return [
        array(weight),
        array(exp_avg) if beta1 else None,
        array(exp_avg_sq),
        array(exponents) if exp_avg_sq.dtype == torch.uint8 else None,
        array(touched_at),
    ]


def adam_step(threads: int, seed: int = 0) -> Callable[..., None]:
    """`adam_step_` as the kernels compute it, the threads in the order of `seed`."""

    def op(weight, state, gradient, rates, rule) -> None:
        testing.cuda_seed(seed)
        try:
            testing.cuda_adam_step(
                matrix(weight, state, rates[1]),
                *(array(gradient), DTYPES.index(gradient.dtype), rates, rule, threads),
            )
        finally:
            testing.cuda_seed(0)

    return op


def native(*args: Any) -> None:
    torch.ops.gemmascope_fast.adam_step_.default(*args)


# ---- arithmetic


@pytest.mark.parametrize("row", [0, 7, 2**31 + 5, 2**40 + 3])
@pytest.mark.parametrize(("step", "seed"), [(1, 0), (77, -3 << 40), (2**32 + 9, 2**63 - 1)])
def test_random_words_are_those_of_the_reference(row, step, seed):
    ours = testing.adam_random_words(seed % 2**64, row, step, 9)
    theirs = reference.random_words(torch.tensor([row]), 36, step, seed)
    assert (ours == theirs.numpy()[0]).all()


def test_philox_known_answers():
    words = testing.adam_random_words(0, 0, 0, 1)
    assert [f"{w:08x}" for w in words] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


def test_rounding_is_that_of_the_reference():
    wide = torch.randn(5000) * 10.0 ** torch.arange(-45, 5).repeat(100)
    short = torch.tensor([0x7F800001, 0x7F80FFFF], dtype=torch.int32).view(torch.float32)  # NaN
    w = torch.cat([torch.cat([torch.tensor(SPECIAL), short]).repeat(50), wide])
    random = torch.randint(0, 2**32, w.shape)
    ours = testing.adam_rounded(w.numpy(), random.numpy().astype(np.uint32))
    theirs = reference.round_stochastically(w, random)
    assert_same(torch.from_numpy(ours.view(np.int16)).view(torch.bfloat16), theirs)


def test_every_code_means_what_the_reference_says():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256)
    exponents = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)
    ours = testing.adam_decoded(codes.numpy(), exponents.numpy())
    theirs = reference.decode_moment(codes[:, None], exponents[:, None])
    assert_same(torch.from_numpy(ours), theirs[:, 0])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38, 1e-44, 1e30, 3e38])
@pytest.mark.parametrize("size", [1, 5, 128])
def test_codes_are_those_of_the_reference(scale, size):
    for special in [*SPECIAL, 0.5]:
        v = torch.randn(size).abs() ** 8 * scale
        v[0] = abs(special) if special != -math.nan else -special
        random = torch.randint(0, 2**32, (size,))
        ours, exponent = testing.adam_encoded(v.numpy(), random.numpy().astype(np.uint32))
        codes, exponents = reference.encode_moment(v[None], random[None])
        assert_same(torch.from_numpy(ours), codes[0])
        assert exponent == exponents[0, 0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 2.0**-20, 1e-300])
def test_powers_are_the_hosts(beta):
    gaps = [*range(1, 2000), 4095, 4096, 4097, 123_457, 2**25 + 3, 2**40, 2**62]
    ours = np.array([testing.adam_power(beta, k) for k in gaps], dtype=np.float32)
    theirs = np.array([beta**k for k in gaps]).astype(np.float32)
    assert (ours == theirs).all()


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999, 1 - 2.0**-20, 0.1])
def test_powers_are_rounded_once(beta):
    for k in [*range(1, 300), 1023, 4095, 30_001]:
        assert testing.exact_power(beta, k) == float(Fraction(beta) ** k)


def near(values: np.ndarray, units: int) -> np.ndarray:
    """`values` as float32, off by so many units in the last place."""
    return (values.astype(np.float32).view(np.int32) + units).view(np.float32)


@pytest.mark.parametrize("units", range(-3, 4))
def test_roots_are_rounded_once_from_any_start(units):
    for octave in (0, 1):
        v = (np.arange(2**23, dtype=np.int32) + (127 + octave << 23)).view(np.float32)
        roots = testing.adam_roots(v, near(1 / np.sqrt(v.astype(np.float64)), units))
        assert (roots == np.sqrt(v)).all()


@pytest.mark.parametrize("units", range(-2, 3))
def test_quotients_are_rounded_once_from_any_start(units):
    b = (np.arange(2**23 - 8, dtype=np.int32) + (127 << 23)).view(np.float32)
    start = near(1 / b.astype(np.float64), units)
    y = testing.adam_reciprocals(b, start).astype(np.float64)
    assert (abs(1 - b * y) * b).max() < 2.0**-23 * (1 - 2.0**-18)  # which Markstein's bound needs
    a = np.random.default_rng(0).permutation(b) * np.float32(-(2.0**-40))
    assert (testing.adam_quotients(a, b, start) == a / b).all()
    small = np.float32(2.0**-59)
    assert (testing.adam_quotients(a, b * small, start / small) == a / (b * small)).all()


def test_quotients_of_zero_keep_the_sign():
    a = np.array([0.0, -0.0], np.float32)
    b = np.array([3.0, 3.0], np.float32)
    quotients = testing.adam_quotients(a, b, 1 / b)
    assert np.signbit(quotients).tolist() == [False, True] and not quotients.any()


# ---- whole kernels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rates", [RATES, [0.01, 0.8, 0.9, 1e-8], [1.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 15, 130, 132, 640, 1157])
def test_the_bits_of_the_cpu_op(way, rates, moments, dtype, columns):
    weight = torch.randn(9, columns).to(dtype)
    tail = 3 if rates[1] else 0
    for flags in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "seed": -3 << 40}):
        rule = {"moments": moments, "rates": rates, "tail": tail, **flags}
        ours = run(adam_step(way, seed=columns), weight, 5, **rule)
        assert_all_same(ours, run(native, weight, 5, **rule))
        assert not torch.equal(ours[0], weight) and ours[2].any()


@pytest.mark.parametrize("columns", [640, 2304, 8192])
@pytest.mark.parametrize("beta1", [0.8, 0.0])
def test_wide_rows(columns, beta1):
    weight = torch.randn(3, columns).bfloat16()
    rule = {"moments": "8bit", "rates": [0.01, beta1, 0.9, 1e-8], "tail": FOREVER if beta1 else 0}
    ours = run(adam_step(256), weight, 3, dtype=torch.float16, **rule)
    assert_all_same(ours, run(native, weight, 3, dtype=torch.float16, **rule))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize(
    ("dtype", "moments", "beta1"),
    [(torch.bfloat16, "8bit", 0.0), (torch.float32, "fp32", 0.0), (torch.float32, "fp32", 0.9)],
)
def test_elements_of_any_size(way, eps, dtype, moments, beta1):
    """Roots and quotients inside and outside the range that has code of its own."""
    results = []
    for op in (adam_step(way), native):
        torch.manual_seed(0)
        weight = torch.randn(8, 1000).to(dtype)
        state = adam_state(weight, moments, beta1)
        for step in range(1, 5):
            scale = torch.randint(-44, 35, (8, 1000)) if step % 2 else torch.randint(-9, 0, (8, 1))
            gradient = torch.randn(8, 1000) * 10.0**scale
            gradient[torch.rand(8, 1000) < 0.1] = 0.0
            gradient[torch.rand(8, 1000) < 0.1] = -0.0
            op(weight, state, gradient, [0.1, beta1, 0.999, eps], [step, 0, 0, 0, 3])
        results.append([weight, *state])
    assert_all_same(*results)


@pytest.mark.parametrize("columns", [20, 128, 300, 1157, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_do_not_depend_on_the_way(columns, dtype):
    weight = torch.nn.functional.normalize(torch.randn(5, columns)).to(dtype)
    flags = {"remove_parallel": True, "unit_norm": True, "dtype": torch.float32}
    first, *others = (run(adam_step(way, seed=way), weight, 4, "8bit", **flags) for way in WAYS)
    for other in others:
        assert_all_same(other, first)
    if dtype == torch.float32:
        double = run(reference.adam_step_, weight.double(), 4, **flags | {"dtype": torch.float64})
        exact = run(adam_step(256), weight, 4, **flags)[0]
        torch.testing.assert_close(exact.double(), double[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exact.norm(dim=1), torch.ones(5), rtol=3e-7, atol=0)


def pairs(values: np.ndarray) -> np.float32:
    """Sum of neighbours, then of pairs of them, and so on."""
    while values.shape[0] > 1:
        values = values[::2] + values[1::2]
    return np.float32(values[0])


def row_sum(products: np.ndarray) -> np.float32:
    """The order that adam_row.cuh writes down."""
    blocks = np.pad(products, (0, -products.shape[0] % 128)).reshape(-1, 128)
    lanes = np.zeros(32, np.float32)
    for k, block in enumerate(blocks):
        lanes[k % 32] += pairs(block)
    return pairs(lanes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("columns", [3, 131, 5000])
def test_sums_are_in_the_order_that_is_written_down(way, columns):
    if way == 64:
        columns = min(columns, 1024)
    w, g = torch.randn(1, columns), torch.randn(1, columns)
    mine, state = w.clone(), adam_state(w)
    adam_step(way)(mine, state, g, [1.0, 0.0, 0.0, 0.0], [1, 0, 1, 1, 0])
    x, y = w[0].numpy(), g[0].numpy()
    share = row_sum(y * x) / row_sum(x * x)
    y = y - share * x
    assert_same(state[1][0], torch.from_numpy(y * y))
    new = x - y / np.sqrt(y * y)
    assert_same(mine[0], torch.from_numpy(new / np.sqrt(row_sum(new * new))))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_of_zeros_keeps_its_direction(way):
    weight = torch.zeros(2, 16)
    gradient = torch.tensor([[0.0], [1.0]]).expand(2, 16).contiguous()
    adam_step(way)(weight, adam_state(weight), gradient, RATES, [1, 0, 1, 1, 0])
    assert_same(weight[0], torch.zeros(16))
    torch.testing.assert_close(weight[1], torch.full((16,), -0.25))
    weight, rates = torch.zeros(2, 16), [0.0, *RATES[1:]]
    adam_step(way)(weight, adam_state(weight), gradient, rates, [1, 0, 1, 1, 0])
    assert_same(weight, torch.zeros(2, 16))


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_gradient_are_not_touched(way):
    weight = torch.randn(6, 1100)
    before, state = weight.clone(), adam_state(weight)
    gradient = torch.zeros(6, 1100)
    gradient[2, 1099], gradient[4] = 1e-45, -0.0
    state[1][4] = 5.0
    adam_step(way)(weight, state, gradient, RATES, [1, 0, 0, 1, 0])
    assert state[3].tolist() == [0, 0, 1, 0, 0, 0]
    kept = [0, 1, 3, 4, 5]
    assert_same(weight[kept], before[kept])
    assert not torch.equal(weight[2], before[2])
    assert_same(state[1][kept], torch.tensor([0, 0, 0, 5.0, 0])[:, None].expand(5, 1100).clone())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_as_in_the_cpu_op(way, moments, dtype):
    results = []
    for op in (adam_step(way), native):
        weight = torch.ones(5, 300, dtype=dtype)
        state = adam_state(weight, moments)
        gradient = torch.ones(5, 300)
        gradient[1, 3], gradient[2, 290], gradient[3, 7] = math.nan, math.inf, -math.inf
        weight[4, 5], weight[4, 6] = math.inf, math.nan
        for step in (1, 2):
            op(weight, state, gradient, RATES, [step, 0, 0, 0, 9])
            gradient = torch.ones(5, 300)
        results.append([weight, *state])
    assert_all_same(*results)
    assert results[0][0][0].isfinite().all() and results[0][0][1, 3].isnan()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gap", [1, 4096, 2**25 + 3])
def test_moments_decay_over_any_gap(way, gap):
    results = []
    for op in (adam_step(way), native):
        weight = torch.zeros(1, 3)
        state = adam_state(weight)
        state[1].fill_(2.0)
        state[3].fill_(7)
        rule = [7 + gap, 0, 0, 0, 0]
        op(weight, state, torch.ones(1, 3), [0.1, 0.0, 1 - 2.0**-20, 1e-8], rule)
        results.append([weight, *state])
    assert_all_same(*results)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shift", [0, 1, 2, 5])
@pytest.mark.parametrize("columns", [33, 256])
@pytest.mark.parametrize("beta1", [0.8, 0.0])
def test_any_alignment_of_rows(way, shift, columns, beta1):
    """Weight, moments, codes and gradient begin anywhere, and only their own elements change."""
    results = []
    for op in (adam_step(way), native):
        torch.manual_seed(shift)
        padded = torch.full((7, columns + 37), 9.0).bfloat16()
        weight = padded[:, shift : shift + columns].copy_(torch.randn(7, columns))
        state = adam_state(weight, "8bit", beta1)
        codes = torch.zeros(7, columns + 13, dtype=torch.uint8)
        if beta1:
            state[0] = torch.zeros(7, columns + 9)[:, shift : shift + columns]
        state[1] = codes[:, shift : shift + columns]
        gradient = torch.randn(7, columns + 6).half()[:, shift : shift + columns]
        for step in (1, 2):
            op(weight, state, gradient, [0.01, beta1, 0.9, 1e-8], [step, 0, 0, 0, 3])
        assert (padded[:, :shift] == 9).all() and (padded[:, shift + columns :] == 9).all()
        assert not codes[:, :shift].any() and not codes[:, shift + columns :].any()
        results.append([padded, *(s.clone() for s in state)])
    assert_all_same(*results)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_threads_changes_no_bit(way):
    weight = torch.randn(6, 700).bfloat16()
    flags = {"rates": [0.01, 0.8, 0.9, 1e-8], "tail": 2, "remove_parallel": True, "unit_norm": True}
    results = [run(adam_step(way, seed), weight, 3, "8bit", **flags) for seed in range(8)]
    for other in results[1:]:
        assert_all_same(other, results[0])
