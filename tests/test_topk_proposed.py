"""TopK of a packed encoder: int8 products estimate each row's limit, canonical dots settle it.

`gsf.explain()` counts a block once where the estimates held and twice where they did not.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from conftest import native_absent
from hypothesis import given, settings
from screening import ENCODERS, Data, assert_bits, call, compare, draw
from torch import Tensor

import gemmascope_fast as gsf

ABSENT = native_absent(ENCODERS)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)

BLOCK = 48


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda mode: monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)


def passes(screen: Callable[[str], None], data: Data, k: int = 6) -> float:
    """How often a block was looked at, after comparing the result with the direct one."""
    x, W, b, _ = data
    screen("never")
    expected = torch.ops.gemmascope_fast.topk_encode(x, W, b, k, True, None)
    screen("always")
    codes = torch.ops.gemmascope_fast.pack_encoder(W, None)
    found = torch.ops.gemmascope_fast.topk_encode(x, W, b, k, True, codes)
    assert_bits(found, expected, "packed")
    said = gsf.explain()
    return (said.screened_blocks + said.direct_blocks) / -(-W.shape[1] // BLOCK)


def test_the_estimates_hold_and_spare_dots(screen: Callable[[str], None]) -> None:
    data = draw(60, 384, 4800)
    assert passes(screen, data) == 1
    proposed, rescored = gsf.explain().candidates, gsf.explain().rescored
    assert 60 * 6 <= rescored < proposed / 2
    call("topk_encode", data)
    assert rescored < gsf.explain().rescored / 2  # not packed: one pass


def hadamard(size: int) -> Tensor:
    H = torch.ones(1, 1)
    while H.shape[0] < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def overestimated(d: int = 256) -> Data:
    """Ten latents whose products are all too large, by as much as the bound allows."""
    H = hadamard(d)
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (d,), generator=g).float() * 2 - 1
    y = signs * 10.55  # codes 11: each adds 0.45 in the direction of the latents below
    y[0] = signs[0] * 127
    W = 1e-3 * torch.randn(480, d, generator=g)
    rows = (127 * signs * (1 - 1e-3 * torch.arange(10.0))[:, None]) @ H / d
    W[::48] = rows
    x = (y @ H / d).expand(9, d).contiguous()
    return x, W.t(), torch.zeros(480), torch.zeros(480)


def test_estimates_that_are_too_high_are_noticed(screen: Callable[[str], None]) -> None:
    assert passes(screen, overestimated()) == 2


def test_more_than_can_be_held(screen: Callable[[str], None]) -> None:
    """Ties everywhere: every entry is proposed."""
    x, W = torch.ones(256, 64), torch.ones(32_768, 64)
    data = x, W.t(), torch.zeros(32_768), torch.zeros(32_768)
    assert 1 < passes(screen, data) <= 2


def test_less_than_k_positive_entries(screen: Callable[[str], None]) -> None:
    x, W, b, t = draw(20, 64, 400)
    assert passes(screen, (x, W, b - 100, t)) == 1
    b[[3, 50, 399]] += 200  # three of six
    b -= 100
    assert passes(screen, (x, W, b, t)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "W", "b", "most of b"])
def test_values_that_are_not_finite(
    screen: Callable[[str], None], where: str, value: float
) -> None:
    x, W, b, t = draw(20, 96, 400)
    {"x": x[4:6, 5], "W": W.t()[[3, 100], 0], "b": b[7:10], "most of b": b[20:]}[where].fill_(value)
    W.t()[7, 3] = value if where == "W" else W.t()[7, 3]
    passes(screen, (x, W, b, t))


def test_many_of_few_take_one_pass(screen: Callable[[str], None]) -> None:
    assert passes(screen, draw(20, 64, 200), k=100) == 1
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
