"""What the tests of screened and of packed encoders share: data, and the comparison of paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import assert_all_same
from torch import Tensor

import gemmascope_fast as gsf

ENCODERS = ("jumprelu_encode", "topk_encode", "batchtopk_encode")
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # x, W_enc, b_enc, threshold


def call(name: str, data: Data, bandwidth: float = 0.3, packed: Tensor | None = None) -> Any:
    """Run an encoder with about 6 entries per token where TopK selects."""
    x, W_enc, b_enc, threshold = data
    op = getattr(torch.ops.gemmascope_fast, name)
    k = min(6, W_enc.shape[1])
    options: dict[str, tuple[Any, ...]] = {
        "jumprelu_encode": (threshold, bandwidth, None),
        "topk_encode": (k,),
        "batchtopk_encode": (k, None, None),
    }
    return op(x, W_enc, b_enc, *options[name], True, packed)


def assert_bits(ours: Any, expected: Any, what: str) -> None:
    assert_all_same(list(ours), list(expected), [f"{what}, output {i}" for i in range(len(ours))])


def token_code() -> int:
    """The largest code of a token on the instruction set in use."""
    testing: Any = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
    return int(testing.screen_token_code(testing.simd_target()))


def coarseness() -> float:
    """How many times as many candidates short codes may leave."""
    return 2.5 if token_code() < 127 else 1.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def entries_of(acts: gsf.SparseActs) -> list[Tensor]:
    return [acts.offsets, acts.indices, acts.values.detach(), acts.gate.detach()]


def compare(
    screen: Callable[[str], None],
    data: Data,
    center: Tensor | None = None,
    bandwidth: float = 0.3,
) -> None:
    """All three encoders: screened and packed against direct."""
    screen("always")
    codes = torch.ops.gemmascope_fast.pack_encoder(data[1], center)
    for name in ENCODERS:
        screen("never")
        expected = call(name, data, bandwidth)
        screen("always")
        found = call(name, data, bandwidth)
        assert gsf.explain().path == "screened" or 0 in (data[0].numel(), data[1].numel())
        assert_bits(found, expected, name)
        assert_bits(call(name, data, bandwidth, codes), expected, f"{name}, packed")
        screen("gathered")
        assert_bits(call(name, data, bandwidth, codes), expected, f"{name}, gathered")


def draw(n: int, d: int, f: int, seed: int = 0, rank: float = 1.5) -> Data:
    """Gaussian data; thresholds so that a tenth fire."""
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=g), torch.randn(f, d, generator=g) / d**0.5
    b = 0.2 * torch.randn(f, generator=g)
    return x, W.t(), b, rank + 0.1 * torch.randn(f, generator=g)


def at_the_ulp(data: Data, above: bool) -> Data:
    """Each latent's largest pre-activation is its threshold, or one ulp above it."""
    x, W_enc, b_enc, _ = data
    latents = torch.arange(W_enc.shape[1]).repeat(x.shape[0])
    rows = torch.arange(x.shape[0]).repeat_interleave(W_enc.shape[1])
    pre = gsf.pre_at(x, W_enc, b_enc, rows, latents).view(x.shape[0], -1)
    largest = pre.max(0).values
    limit = torch.nextafter(largest, torch.tensor(-torch.inf)) if above else largest
    return x, W_enc, b_enc, limit
