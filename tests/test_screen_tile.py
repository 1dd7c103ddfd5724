"""The screen's tile on every instruction set of this processor, against whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

testing: Any = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
BLOCK = 48
TARGETS = list(testing.SimdTarget.__members__)


def target_of(name: str) -> Any:
    target = testing.SimdTarget.__members__[name]
    if not testing.simd_target_available(target):
        pytest.skip(f"{name}: not on this processor")
    return target


def codes(rng: np.random.Generator, kind: str, shape: tuple[int, int], most: int) -> np.ndarray:
    if kind == "random":
        return rng.integers(-most, most + 1, shape, dtype=np.int8)
    return np.full(shape, most if kind == "largest" else -most, np.int8)


@pytest.mark.parametrize(
    "kinds", [(a, b) for a in ("random", "largest", "least") for b in (a, "largest")]
)
@pytest.mark.parametrize("d", [64, 320, 1152])
@pytest.mark.parametrize("name", TARGETS)
def test_products_and_masks(name: str, d: int, kinds: tuple[str, str]) -> None:
    """A chunk's product is exact with scales of powers of two: every target gives the same bits."""
    target, rng = target_of(name), np.random.default_rng(d)
    chunks = d // testing.screen_chunk(d)
    w = codes(rng, kinds[1], (BLOCK, d), 127)
    w_scale = np.exp2(rng.integers(-2, 3, (chunks, BLOCK))).astype(np.float32)
    x_scale = np.exp2(rng.integers(-2, 3, (chunks, 16))).astype(np.float32)
    for rows in range(1, testing.screen_tile_rows(target) + 1):
        x = codes(rng, kinds[0], (rows, d), int(testing.screen_token_code(target)))
        parts = np.einsum(
            "rck,jck->rcj",
            x.reshape(rows, chunks, -1).astype(np.int64),
            w.reshape(BLOCK, chunks, -1).astype(np.int64),
        )
        wanted = np.zeros((rows, BLOCK), np.float32)
        for c in range(chunks):
            wanted += (parts[:, c] * x_scale[c, :rows, None] * w_scale[c]).astype(np.float32)
        bound = rng.permutation(wanted[0])
        products, masks = testing.screen_tile(target, x, w, x_scale, w_scale, bound)
        assert np.array_equal(products, wanted)
        above = (masks[:, None] >> np.arange(BLOCK, dtype=np.uint64)) & np.uint64(1)
        assert np.array_equal(above != 0, wanted > bound)


@pytest.mark.parametrize("name", TARGETS)
def test_nan_is_a_candidate(name: str) -> None:
    target = target_of(name)
    bound = np.where(np.arange(BLOCK) % 3 == 0, np.nan, 1).astype(np.float32)
    ones = np.ones((1, BLOCK), np.float32)
    x, w = np.zeros((5, 64), np.int8), np.zeros((BLOCK, 64), np.int8)
    _, masks = testing.screen_tile(target, x, w, ones[:, :16], ones, bound)
    assert set(masks.tolist()) == {sum(1 << j for j in range(0, BLOCK, 3))}


@pytest.mark.parametrize("kind", ["random", "largest", "least"])
@pytest.mark.parametrize("name", TARGETS)
def test_fine_dots(name: str, kind: str) -> None:
    target, rng = target_of(name), np.random.default_rng(3)
    for count in range(1, 10):
        most = int(testing.screen_token_code(target))
        x, w = (codes(rng, kind, (count, 384), m) for m in (most, 127))
        found = testing.screen_fine_dots(target, x, w)
        wanted = (x.astype(np.int64) * w.astype(np.int64)).sum(1)
        assert np.array_equal(found, wanted.astype(np.float32))
