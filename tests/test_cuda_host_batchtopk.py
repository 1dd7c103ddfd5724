"""The BatchTopK encoders on CUDA, plain and screened: their host code and kernels on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchtopk_host import Batch, Found, load
from cuda_host import missing
from oracle import assert_entries, assert_same, batchtopk_support

if missing():
    pytest.skip(missing(), allow_module_level=True)

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("batchtopk"))


def draw(n: int, d_sae: int, margin: float = 0.3, seed: int = 0) -> Batch:
    """Gaussian pre-activations, and bounds that are up to `margin` above them."""
    g = np.random.default_rng(seed)
    pre = g.normal(size=(n, d_sae)).astype(np.float32)
    upper = (pre + margin * g.uniform(0.2, 1, (n, d_sae))).astype(np.float32)
    return Batch(pre, upper, np.ones(n, bool))


def assert_exact(batch: Batch, found: Found, k: float) -> None:
    expected, threshold = batchtopk_support(torch.from_numpy(batch.pre), k)
    assert_entries(found.result, expected)
    assert_same(found.result[5], torch.tensor(threshold), "threshold")
    assert found.result[4] == found.result[0][-1]


def cut_of(batch: Batch, k: float) -> float:
    return batchtopk_support(torch.from_numpy(batch.pre), k)[1]


PROBLEMS = [
    *((1, 40, 3.0, factor) for factor in (0.0, 1.0, 2.0, 0.01)),
    *((20, 1500, 7.3, factor) for factor in (0.0, 1.0, 1.1, 2.0, 0.01)),
    *((70, 600, 2.0, factor) for factor in (0.0, 1.1)),  # two blocks of rows
    (30, 300, 0.04, 0.0),
    (130, 300, 100.0, 0.0),  # more are kept than a chunk has room for
]
"""n, d_sae, k, and the guess as a part of the threshold, 0 for none."""


# ---- plain


@pytest.mark.parametrize(("n", "d_sae", "k", "factor"), PROBLEMS)
def test_plain(library: Any, n: int, d_sae: int, k: float, factor: float) -> None:
    batch = draw(n, d_sae)
    found = batch.encode(library, k, 0.9 * factor * cut_of(batch, k), screened=False)
    assert_exact(batch, found, k)
    overflows = 0 < factor < 1 and n > 1  # d_sae / 2 entries of a row exceed it, and 256 fit
    held = factor == 1.0 or factor == 1.1 or (factor == 0.01 and not overflows)
    assert found.waits == (1 if factor == 0.0 or held else 2)


# ---- screened


@pytest.mark.parametrize(("n", "d_sae", "k", "factor"), PROBLEMS)
def test_screened(library: Any, n: int, d_sae: int, k: float, factor: float) -> None:
    batch = draw(n, d_sae)
    found = batch.encode(library, k, 0.9 * factor * cut_of(batch, k))
    assert found.why is None
    assert_exact(batch, found, k)
    count = int(k * n)
    assert count <= found.decided <= (2 if factor == 2.0 else 1) * (2 * count + 32)
    sure_at_once = factor in (0.0, 1.0, 1.1) or (factor == 0.01 and n == 1)
    assert found.waits >= 4 if factor == 2.0 else not sure_at_once or found.waits == 2


def test_a_guess_with_too_few_uppers_above_it_is_no_proof(library: Any) -> None:
    """Entries below the guess are among the candidates, and those that are not may beat them."""
    batch = draw(40, 600)
    k, count = 4.0, 160
    cut = cut_of(batch, k)
    guess = 1.02 * cut
    batch.upper[:] = batch.pre
    batch.upper[batch.pre < cut] += 0.15  # many reach the guess by their bounds alone
    above = batch.pre[batch.upper > guess]
    assert (above > guess).sum() < count < len(above)
    found = batch.encode(library, k, guess)
    assert_exact(batch, found, k)
    assert found.waits == 4


@pytest.mark.parametrize("guessed", [False, True])
def test_bounds_that_do_not_decide_are_told(library: Any, guessed: bool) -> None:
    batch = draw(30, 900, margin=20.0)
    found = batch.encode(library, 5.0, 0.9 * cut_of(batch, 5.0) * guessed)
    assert found.why == "int8 codes leave the selection undecided"
    assert_exact(batch, found, 5.0)


def test_the_least_bound_kept_must_be_exceeded(library: Any) -> None:
    """Of 3 entries wanted 38 bounds are kept. Then one more that is equal to the cut: a tie."""
    batch = draw(3, 400)
    batch.pre[:] = -1.0
    batch.pre[0, :3] = 5.0
    batch.upper[:] = -0.5
    batch.upper[1, :38] = 4.0
    batch.upper[0, :3] = 5.5
    assert batch.encode(library, 1.0).why is None
    batch.upper[1, :38] = 5.0
    found = batch.encode(library, 1.0)
    assert found.why == "int8 codes leave the selection undecided"
    assert_exact(batch, found, 1.0)
    batch.upper[1, 34:] = 4.0  # now fewer than are kept reach the cut
    assert batch.encode(library, 1.0).why is None


def test_latents_without_codes_come_first_and_are_decided(library: Any) -> None:
    batch = draw(20, 700)
    batch.upper[:, [3, 400]] = NAN
    batch.pre[:, 3] = NAN
    batch.pre[4, 10], batch.upper[4, 10] = INF, INF
    batch.pre[5, 11], batch.upper[5, 11] = -INF, -INF
    for k in (0.5, 1.0, 1.05, 8.0):
        for factor in (0.0, 1.0):
            cut = cut_of(batch, k)
            guess = 0.9 * cut * factor if np.isfinite(cut) else 1.0 * factor
            found = batch.encode(library, k, guess)
            assert found.why is None, k
            assert_exact(batch, found, k)


def test_of_more_of_them_than_are_kept_only_nan_is_sure(library: Any) -> None:
    """20 entries are asked for, of the 400 NaN bounds the first 72 are kept."""
    batch = draw(20, 700)
    batch.upper[:, :20] = NAN
    batch.pre[1:4, :20] = NAN
    for guess in (0.0, 1.0):
        found = batch.encode(library, 1.0, guess)
        assert found.why is None and found.decided == 72
        assert_exact(batch, found, 1.0)
        batch.pre[1:3, :20] = 0.5
        found = batch.encode(library, 1.0, guess)
        assert found.why == "int8 codes leave the selection undecided"
        assert_exact(batch, found, 1.0)
        batch.pre[1:3, :20] = NAN


@pytest.mark.parametrize("screened", [False, True])
def test_a_block_of_rows_that_overflows_leaves_a_guess_unproved(
    library: Any, screened: bool
) -> None:
    """The other block alone has as many entries above it as were asked for."""
    batch = draw(70, 600)
    batch.pre[:64] += 3
    batch.upper[:64] += 3
    assert (batch.pre[64:] > 0.5).sum() > 70
    assert_exact(batch, batch.encode(library, 1.0, 0.5, screened), 1.0)


@pytest.mark.parametrize("guess", [0.0, 1.5])
def test_a_token_without_codes_is_the_plain_encoder_s(library: Any, guess: float) -> None:
    batch = draw(70, 600)
    batch.coded[66] = False
    batch.upper[66] = -INF
    batch.pre[66, 5] = NAN
    found = batch.encode(library, 3.0, guess)
    assert found.why == "a token has no int8 codes" and found.decided == 0
    assert_exact(batch, found, 3.0)


def test_fewer_positive_entries_than_asked(library: Any) -> None:
    batch = draw(20, 500)
    batch.pre -= 3
    batch.upper -= 3
    assert 5 < (batch.pre > 0).sum() < (batch.upper > 0).sum() < 240
    for guess in (0.0, 0.2, 1e30):
        found = batch.encode(library, 12.0, guess)
        assert found.why is None and found.result[5] == 0
        assert_exact(batch, found, 12.0)
    batch.pre[:], batch.upper[:] = -1, -0.5
    found = batch.encode(library, 12.0)
    assert found.why is None and found.result[4] == found.decided == 0


def test_all_entries_and_more(library: Any) -> None:
    batch = draw(18, 300)
    for k in (299.0, 300.0, 400.0):
        found = batch.encode(library, k)
        assert found.why is None
        assert_exact(batch, found, k)


def test_where_all_bounds_are_kept_nothing_can_be_left_out(library: Any) -> None:
    """The least of them is no limit then, though it exceeds most of what was decided."""
    batch = draw(18, 300, margin=20.0)
    batch.pre, batch.upper = np.abs(batch.pre), np.abs(batch.upper) + 4
    pairs = batch.pre.size
    for k, decided in ((150.0, pairs), (300.0, pairs), (149.0, 2 * 149 * 18 + 32)):
        for guess in (0.0, 1e-4):
            found = batch.encode(library, k, guess)
            assert_exact(batch, found, k)
            assert found.decided == decided
            told = None if decided == pairs else "int8 codes leave the selection undecided"
            assert found.why == told


def test_ties_go_to_row_then_latent(library: Any) -> None:
    batch = draw(20, 600)
    batch.pre[:] = np.floor(batch.pre)
    batch.upper[:] = batch.pre + 0.4
    ties = int((batch.pre == cut_of(batch, 20.0)).sum())
    found = batch.encode(library, 20.0)
    assert ties > 1000 and found.why == "int8 codes leave the selection undecided"
    assert_exact(batch, found, 20.0)
    batch.pre[:, 5:], batch.upper[:, 5:] = -1, -1
    for k in (1.3, 4.0):
        found = batch.encode(library, k)
        assert found.why is None
        assert_exact(batch, found, k)


def test_later_latents_that_beat_earlier_ones_overflow_and_are_found(library: Any) -> None:
    batch = draw(20, 1500)
    rise = 0.01 * np.arange(1500, dtype=np.float32)
    batch.pre += rise
    batch.upper += rise
    for guess in (0.0, 0.1, 0.9 * cut_of(batch, 3.0)):
        found = batch.encode(library, 3.0, guess)
        assert found.why is None
        assert_exact(batch, found, 3.0)
        assert found.waits == {0.0: 3, 0.1: 4}.get(guess, 2)


@pytest.mark.parametrize(
    ("n", "d_sae", "reason"),
    [(16, 4000, "there are few tokens"), (17, 1500, "d_sae is small for this k"), (17, 1600, None)],
)
def test_when_it_is_not_worth_it(library: Any, n: int, d_sae: int, reason: str | None) -> None:
    batch = draw(n, d_sae)
    batch.always = False
    found = batch.encode(library, 1.0)
    assert found.why == reason
    assert_exact(batch, found, 1.0)


def test_codes_of_something_else_are_an_error(library: Any) -> None:
    with pytest.raises(RuntimeError, match="no codes"):
        draw(20, 300).encode(library, 3.0, wrong=True)
