"""Screened TopK and BatchTopK: what was seen estimates the limit, which is proved in the end.

`gsf.explain()` counts a block once where the estimates held and twice where they did not.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import native_absent
from hypothesis import given, settings
from screening import ENCODERS, Data, assert_bits, coarseness, compare, draw, threads

import gemmascope_fast as gsf

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
ABSENT = native_absent(ENCODERS)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)

BLOCK = 48


@pytest.fixture(params=["packed", "held", "not packed"])
def way(request: pytest.FixtureRequest) -> str:
    """Candidates of packed weights are held where the processor has AMX, or by name."""
    return str(request.param)


@pytest.fixture(params=["topk", "batchtopk"])
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def passes(op: str, way: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """How often a block was looked at, after comparing the result with the direct one."""

    def run(data: Data, k: int = 6) -> float:
        x, W, b, _ = data
        encode = getattr(torch.ops.gemmascope_fast, f"{op}_encode")
        arguments = (k,) if op == "topk" else (k, None, None)
        monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "never")
        expected = encode(x, W, b, *arguments, True, None)
        mode = "gathered" if way == "held" else "always"
        monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)
        packed = way != "not packed"
        codes = torch.ops.gemmascope_fast.pack_encoder(W, None) if packed else None
        found = encode(x, W, b, *arguments, True, codes)
        assert_bits(found, expected, "screened")
        said = gsf.explain()
        return (said.screened_blocks + said.direct_blocks) / -(-W.shape[1] // BLOCK)

    return run


def test_the_estimates_hold(passes: Callable[..., float]) -> None:
    assert passes(draw(60, 384, 4800)) == 1


def test_few_are_candidates_beside_the_largest(passes: Callable[..., float]) -> None:
    """By the sixteenth best of the part that was seen it would be 277 a row, not 189."""
    x, W, b, t = draw(40, 512, 48_000)
    with threads(1):  # each thread's first block meets no limit
        assert passes((x, W, 0 * b, t), k=16) == 1
    assert gsf.explain().candidates < 40 * 230 * coarseness()


@pytest.mark.parametrize(("n", "size", "k"), [(40, 9600, 32), (40, 24_000, 256)])
def test_threads_that_wait_for_each_other_cost_no_second_pass(
    passes: Callable[..., float], n: int, size: int, k: int
) -> None:
    x, W, b, t = draw(n, 64, size)
    with threads(8):
        assert [passes((x, W, b, t), k=k) for _ in range(15)] == [1] * 15


@pytest.mark.parametrize("order", ["falling", "rising", "a group"])
def test_the_order_of_the_latents_costs_no_second_pass(
    passes: Callable[..., float], order: str
) -> None:
    x, W, b, t = draw(40, 256, 24_000)
    at = torch.arange(24_000.0)
    size = {
        "falling": 3 - at / 9_000,
        "rising": 0.3 + at / 9_000,
        "a group": 1 + 2 * (at < 800),  # has nearly all large values
    }[order]
    W = (W.t() * size[:, None]).t()
    assert passes((x, W, 0 * b, t), k=32) == 1


@pytest.mark.parametrize("hot", [48, 96, 192])
def test_a_small_first_group_costs_no_second_pass(passes: Callable[..., float], hot: int) -> None:
    """It may lie in one block: at whatever place of an order that is drawn anew for each size."""
    for size in range(9_600, 24_000, 1_440):
        x, W, b, t = draw(40, 128, size)
        W = (W.t() * (1 + 5.0 * (torch.arange(size) < hot))[:, None]).t()
        assert passes((x, W, 0 * b, t), k=32) == 1, size


def test_rows_of_zeros_cost_no_second_pass(passes: Callable[..., float]) -> None:
    """Their entries are the biases, and nothing is left of the margins."""
    x, W, b, t = draw(60, 384, 4800)
    x[3], x[7] = 0, 1e-7 * x[7]
    assert passes((x, W, b, t)) == 1


def test_dead_latents_beside_a_row_out_of_range(passes: Callable[..., float]) -> None:
    """The codes say nothing of their entries, not even how wrong they may be."""
    for seed in range(4):
        x, W, b, t = draw(64, 256, 9600, seed=seed)
        x[3] *= 1e-14
        W.t()[::97] = 0
        assert passes((x, W, 0.5 * (torch.arange(9600) % 97 == 0), t), k=32) == 1


def test_bounds_of_many_blocks(passes: Callable[..., float]) -> None:
    """Latents of all sizes under a common part of x, which the codes leave to the bounds."""
    x, W, b, t = draw(40, 256, 12_000)
    sizes = torch.exp(2 * torch.randn(250, generator=torch.Generator().manual_seed(1)))
    W = (W.t() * sizes.repeat_interleave(BLOCK)[:, None]).t()
    assert passes((x + 50 * x[0], W, b, t), k=16) == 1


@pytest.mark.parametrize(("k", "total"), [(1, 480), (6, 4800), (64, 65_536), (4096, 65_536)])
def test_ranks_in_a_part_of_the_values(k: int, total: int) -> None:
    """As few as have a chance of 1 in 10^7 at most, by the exact binomial tail."""
    ranks = testing.sample_ranks(k, total)
    assert len(ranks) == total and ranks[-1] == k and (np.diff(ranks) >= 0).all()
    shown = np.unique(np.linspace(1, total, 60).astype(int))
    for part, r in zip(shown / total, np.array(ranks)[shown - 1], strict=True):
        if r < k:
            assert binomial_tail(r, k, part) < 1.2e-7
        if r > 1:  # not wastefully many; the table looks up to 1/1024 of the values ahead
            assert binomial_tail(r - 1, k, min(1, part + 1 / 1024)) > 1e-9


def binomial_tail(r: int, k: int, part: float) -> float:
    """The chance that `r` or more of `k` are in a random part of everything."""
    hits = torch.arange(int(r), k + 1, dtype=torch.float64)
    logs = torch.lgamma(torch.tensor([k + 1.0]).double()) - torch.lgamma(hits + 1)
    logs = logs - torch.lgamma(k - hits + 1) + torch.xlogy(hits, torch.tensor(part).double())
    logs = logs + torch.xlogy(k - hits, torch.tensor(1 - part).double())
    return float(logs.exp().sum())


def test_a_second_pass_begins_anew(passes: Callable[..., float]) -> None:
    """A block that comes early has the winners of all rows: what the first pass took is void."""
    x, W, b, t = draw(60, 384, 32_768)
    for at in range(0, 32_768, BLOCK):
        hot = W.t().clone()
        hot[at : at + BLOCK] *= 6
        if passes((x, hot.t(), 0 * b, t), k=32) == 2:
            return
    raise AssertionError("no order of the blocks misleads the estimate")


@pytest.mark.parametrize("op", ["topk"])
@pytest.mark.parametrize("of_all", [0.0, float("nan")], ids=["finite", "a latent of NaN"])
def test_a_second_pass_is_for_the_rows_that_need_it(
    passes: Callable[..., float], of_all: float
) -> None:
    """A block that comes early has the winners of one row; those of the others stay as found."""
    x, W, b, t = draw(60, 128, 8_192)
    b[11] = of_all  # NaN comes whatever the limit is
    own = torch.randn(128)
    x[17] += 3 * own
    b *= torch.arange(8_192) == 11
    assert passes((x, W, b, t), k=32) == 1
    once = gsf.explain().candidates
    for at in range(0, 8_192, BLOCK):
        hot = W.t().clone()
        hot[at : at + BLOCK] += 0.2 * own / own.norm()
        if passes((x, hot.t(), b, t), k=32) == 2:
            assert gsf.explain().candidates < 1.2 * once
            return
    raise AssertionError("no order of the blocks misleads the estimate")


@pytest.mark.parametrize("k", [6, 64])
def test_ties_everywhere(passes: Callable[..., float], k: int) -> None:
    x, W = torch.ones(256, 64), torch.ones(32_768, 64)
    assert passes((x, W.t(), torch.zeros(32_768), torch.zeros(32_768)), k=k) == 1


def test_less_than_k_positive_entries(passes: Callable[..., float]) -> None:
    x, W, b, t = draw(20, 64, 400)
    assert passes((x, W, b - 100, t)) == 1
    b[[3, 50, 399]] += 200  # three of six
    b -= 100
    assert passes((x, W, b, t)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "W", "b", "most of b"])
def test_values_that_are_not_finite(passes: Callable[..., float], where: str, value: float) -> None:
    x, W, b, t = draw(20, 96, 400)
    {"x": x[4:6, 5], "W": W.t()[[3, 100], 0], "b": b[7:10], "most of b": b[20:]}[where].fill_(value)
    W.t()[7, 3] = value if where == "W" else W.t()[7, 3]
    passes((x, W, b, t))


def test_many_of_few_take_one_pass(passes: Callable[..., float]) -> None:
    assert passes(draw(20, 64, 200), k=100) == 1
    assert gsf.explain().direct_blocks > 0  # at first everything is a candidate


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 150),
    f=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    shift=st.floats(-1e3, 1e3),
    spread=st.floats(0, 10),
    centre=st.sampled_from(["mean", "opposite", "foreign", "one"]),
)
def test_any_packed_centre(
    n: int, d: int, f: int, seed: int, shift: float, spread: float, centre: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, W, b, t = draw(n, d, f, seed)
    x = x * torch.exp(spread * torch.rand(d, generator=g)) + shift * torch.randn(d, generator=g)
    given_centre = {
        "mean": x.mean(0),
        "opposite": -x.mean(0),
        "foreign": 10 * torch.randn(d, generator=g),
        "one": torch.eye(d)[d // 2] * shift,
    }[centre]
    with pytest.MonkeyPatch.context() as patch:
        compare(
            lambda mode: patch.setenv("GEMMASCOPE_FAST_SCREEN", mode), (x, W, b, t), given_centre
        )
