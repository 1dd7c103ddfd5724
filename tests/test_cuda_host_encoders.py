"""The encoders on CUDA from their arguments to their results, on a CPU: host code and kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_host import missing
from encoders_host import NAMESPACE, load
from oracle import assert_same

import gemmascope_fast as gsf
from gemmascope_fast import ops

if missing():
    pytest.skip(missing(), allow_module_level=True)

CUDA, REFERENCE = (getattr(torch.ops, name) for name in (NAMESPACE, ops.REFERENCE))
NAMES = ("offsets", "indices", "values", "gate")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(autouse=True)
def state(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Toy sizes have too few latents for screening to pay."""
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")
    library.take_waits()
    yield
    library.set_seed(0)
    library.capture(False)


def whole(n: int, d: int, d_sae: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """x, W_enc, b_enc of whole numbers, so that sums are exact in any order."""
    g = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randint(-2, 3, size, generator=g) for size in ((n, d), (d_sae, d), (d_sae,)))
    return x.to(dtype), W.to(dtype).t(), b.float()


def assert_results(ours: Any, expected: Any, what: str = "") -> None:
    for name, mine, truth in zip(NAMES, ours, expected, strict=False):
        assert_same(mine, truth, f"{name} {what}")


KERNELS = {
    "few tokens": (7, torch.bfloat16, ""),
    "Hopper": (40, torch.bfloat16, ""),
    "small tiles": (20, torch.bfloat16, ""),
    "large tiles": (33, torch.bfloat16, "portable"),
    "float32": (36, torch.float32, ""),
}


@pytest.mark.parametrize("kernel", KERNELS)
class TestPlain:
    """On every kernel of the products, whole numbers against the reference."""

    def test_jumprelu(self, library: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
        n, dtype, choice = KERNELS[kernel]
        monkeypatch.setenv("GEMMASCOPE_FAST_CUDA_ENCODE", choice)
        x, W, b = whole(n, 40, 300, dtype)
        x[n // 2, 3], b[17], b[130] = torch.nan, torch.nan, torch.inf
        for seed, theta in enumerate((-50.0, 12.0, 1e6)):  # the first overflows the first arena
            library.set_seed(seed)
            args = (x, W, b, torch.full((300,), theta), 2.0)
            expected = REFERENCE.jumprelu_encode(*args, None, False)
            ours = CUDA.jumprelu_encode(*args, None, False)
            assert library.take_waits() == 1
            assert_results(ours, expected, f"above {theta}")
            nnz = expected[1].shape[0]
            assert ours[4] == nnz
            room = CUDA.jumprelu_encode(*args, nnz + 3, False)
            assert_results((room[0], *(t[:nnz] for t in room[1:4])), expected, "in more room")
            assert room[4] == nnz and not any(t[nnz:].any() for t in room[1:4])
            less = CUDA.jumprelu_encode(*args, nnz // 2, False)
            assert less[4] == nnz and less[0][-1] == nnz // 2
            assert nnz < 2 or bool(less[2].isnan().all())
            assert library.take_waits() == 0

    def test_topk(self, library: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
        n, dtype, choice = KERNELS[kernel]
        monkeypatch.setenv("GEMMASCOPE_FAST_CUDA_ENCODE", choice)
        x, W, b = whole(n, 40, 1300, dtype)
        b[9] = torch.nan
        for k in (1, 40, 1300):
            library.set_seed(k)
            ours = CUDA.topk_encode(x, W, b, k, False)
            assert_results(ours, REFERENCE.topk_encode(x, W, b, k, False), f"k = {k}")
            waits = library.take_waits()
            assert waits == 0 or kernel != "few tokens" and k < 1300

    def test_batchtopk(self, library: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
        n, dtype, choice = KERNELS[kernel]
        monkeypatch.setenv("GEMMASCOPE_FAST_CUDA_ENCODE", choice)
        x, W, b = whole(n, 40, 500, dtype)
        for k in (0.5, 9.3):
            expected = REFERENCE.batchtopk_encode(x, W, b, k, None, None, False)
            for guess in (None, float(expected[5]), 3 * float(expected[5])):
                ours = CUDA.batchtopk_encode(x, W, b, k, guess, None, False)
                assert_results(ours, expected, f"k = {k}, guess = {guess}")
                assert ours[4] == expected[4] and ours[5] == expected[5]
            assert library.take_waits() <= 4


@pytest.mark.parametrize("kernel", ["few tokens", "Hopper", "large tiles"])
def test_what_earlier_calls_found_is_room_for_the_next(
    library: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, dtype, choice = KERNELS[kernel]
    monkeypatch.setenv("GEMMASCOPE_FAST_CUDA_ENCODE", choice)
    x, W, b = whole(n, 40, 1300, dtype, seed=5)
    x[n // 2, 3], b[17] = torch.nan, torch.nan
    library.take_events()
    last, known, ways = 0, 0, []
    for at, theta in enumerate((34.0, 34.0, 30.0, 30.0, 40.0, 40.0, 1e6, 1e6, -50.0, -50.0, 34.0)):
        library.set_seed(at)
        args = (x, W, b, torch.full((1300,), theta), 2.0, None)
        expected = REFERENCE.jumprelu_encode(*args, False)
        ours = CUDA.jumprelu_encode(*args, True)  # the view: offsets and indices, here
        assert_results(ours, expected, f"above {theta}, call {at}")
        nnz = expected[1].shape[0]
        assert ours[4] == nnz and library.take_waits() == 1
        assert torch.equal(ours[5], ours[0]) and torch.equal(ours[6], ours[1])
        overflows = nnz - n > max(n * 1300 // 64, 128, known + known // 32 + 64 if known else 0)
        room = last + last // 32 + 64 if last else 0
        early = nnz <= room <= nnz + nnz // 8 + 64 and not overflows
        assert library.take_events() == (room > 0), "placed early, if in vain"
        for t in ours[1:4]:
            assert t.is_contiguous() and not t._is_view() and t.storage_offset() == 0
            whole_of = t.new_empty(0).set_(t.untyped_storage())
            assert whole_of.shape[0] == (room if early else nnz)
            assert not whole_of[nnz:].any()
        last, known = nnz, nnz - n  # of each token one entry is no record: its invalid latent
        ways.append("e" if early else "l")
    assert library.events_left() == 0
    assert "".join(ways[1::2]) == "eeeee", "the call before found the same"
    assert ways[0] == ways[8] == ways[10] == "l" and (n < 30 or ways[2] == ways[4] == "l")


def test_calls_with_and_without_a_window_have_room_of_their_own(library: Any) -> None:
    x, W, b = whole(40, 40, 1300, torch.bfloat16, seed=6)
    theta = torch.full((1300,), 34.0)
    for at in range(3):
        for bandwidth in (6.0, 0.0):
            ours = CUDA.jumprelu_encode(x, W, b, theta, bandwidth, None, False)
            assert_results(ours, REFERENCE.jumprelu_encode(x, W, b, theta, bandwidth, None, False))
            room = ours[1].untyped_storage().nbytes() // 4
            assert (room > ours[1].shape[0]) == (at > 0), f"bandwidth {bandwidth}, call {at}"


def test_records_that_overflow_while_their_entries_fit(library: Any) -> None:
    n, room = 40, lambda found: found + found // 32 + 64
    x, W, b = whole(n, 40, 1300, torch.bfloat16, seed=8)
    theta = torch.full((1300,), 26.0)
    invalid = b.clone()
    invalid[17] = torch.nan  # an entry of each token, and no record
    before = CUDA.jumprelu_encode(x, W, invalid, theta, 0.0, None, False)[1].shape[0]
    for latents in range(1300):
        theta[:latents] = -1e6
        expected = REFERENCE.jumprelu_encode(x, W, b, theta, 0.0, None, False)
        now = expected[1].shape[0]
        if room(before - n) < now <= room(before):
            break
    else:
        pytest.fail("no such number of latents")
    assert before - n > n * 1300 // 64, "beyond the arena of a first call"
    ours = CUDA.jumprelu_encode(x, W, b, theta, 0.0, None, False)
    assert_results(ours, expected)
    assert ours[1].untyped_storage().nbytes() == 4 * now


@pytest.mark.parametrize("recording", [True, False])
def test_a_result_in_more_room_is_edited_like_any_other(library: Any, recording: bool) -> None:
    x, W, b = whole(40, 40, 1300, torch.bfloat16, seed=7)
    for _ in range(2):
        with torch.set_grad_enabled(recording):
            values = CUDA.jumprelu_encode(x, W, b, torch.full((1300,), 34.0), 2.0, None, False)[2]
        expected = 2 * values.sum()
        values.mul_(torch.full((1,), 2.0, requires_grad=True))
        assert values.sum() == expected
    assert values.untyped_storage().nbytes() > 4 * values.shape[0]


def gaussian(n: int, d: int, d_sae: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, W_enc, b_enc around a centre with a massive dimension; then the centre, and the codes."""
    g = torch.Generator().manual_seed(n)
    center = 0.3 * torch.randn(d, generator=g)
    center[5] += 30
    x = (torch.randn(n, d, generator=g) + center).to(dtype)
    W = (torch.randn(d_sae, d, generator=g) / d**0.5).to(dtype)
    b = 0.1 * torch.randn(d_sae, generator=g) - W.float() @ center
    return x, W.t(), b, CUDA.pack_encoder(W.t(), center)


def assert_audited(ours: Any, *args: Any, threshold: Any = None) -> None:
    given, shape = dict(zip(NAMES, ours, strict=False)), (args[0].shape[0], args[1].shape[1])
    acts = gsf.SparseActs(**given, shape=shape, threshold=threshold)
    found = gsf.audit(acts, *args, tokens=10**6)
    assert found.missed == found.extra == 0 < found.entries + found.near, found


SCREENED = [(20, 136, 300, torch.bfloat16), (130, 128, 257, torch.float32)]


@pytest.mark.parametrize(("n", "d", "d_sae", "dtype"), SCREENED)
class TestScreened:
    """By int8 codes, on Hopper's kernels."""

    def test_jumprelu(self, library: Any, n: int, d: int, d_sae: int, dtype: torch.dtype) -> None:
        x, W, b, codes = gaussian(n, d, d_sae, dtype)
        library.take_waits()
        for theta in (1.0, 2.5):  # the first overflows the first arena
            limit = torch.full((d_sae,), theta)
            ours = CUDA.jumprelu_encode(x, W, b, limit, 0.0, None, False, codes)
            assert library.take_waits() == 2 and library.why_not_screened() is None
            assert_audited(ours, x, W, b, limit)

    def test_topk(self, library: Any, n: int, d: int, d_sae: int, dtype: torch.dtype) -> None:
        x, W, b, codes = gaussian(n, d, d_sae, dtype)
        library.take_waits()
        ours = CUDA.topk_encode(x, W, b, 8, False, codes)
        assert library.take_waits() == 1 and library.why_not_screened() is None
        assert 8 * n <= library.decided() <= 48 * n
        assert_audited(ours, x, W, b)
        x[3, 4] = torch.inf  # this token has no codes
        ours = CUDA.topk_encode(x, W, b, 8, False, codes)
        assert library.why_not_screened() is None
        other = CUDA.topk_encode(x, W, b, 8, False)
        assert_same(ours[2][24:32], other[2][24:32])

    def test_batchtopk(self, library: Any, n: int, d: int, d_sae: int, dtype: torch.dtype) -> None:
        x, W, b, codes = gaussian(n, d, d_sae, dtype)
        first = CUDA.batchtopk_encode(x, W, b, 2.5, None, None, False, codes)
        assert library.why_not_screened() is None and first[4] == int(2.5 * n)
        assert int(2.5 * n) <= library.decided() <= 2 * int(2.5 * n) + 32
        assert_audited(first, x, W, b, threshold=first[5])
        library.take_waits()
        for factor, waits in ((1.0, 2), (1.05, 2), (3.0, 4)):
            guess = factor * float(first[5])
            ours = CUDA.batchtopk_encode(x, W, b, 2.5, guess, None, False, codes)
            assert library.take_waits() == waits and library.why_not_screened() is None
            assert_results(ours, first, f"guess = {guess}")
        x[3, 4] = torch.nan
        ours = CUDA.batchtopk_encode(x, W, b, 2.5, None, None, False, codes)
        assert library.why_not_screened() == b"a token has no int8 codes"
        assert_results(ours, CUDA.batchtopk_encode(x, W, b, 2.5, None, None, False))


def test_nothing_waits_while_a_graph_is_captured(library: Any) -> None:
    x, W, b, codes = gaussian(20, 128, 300, torch.bfloat16)
    limit = torch.ones(300)
    calls = (
        lambda *more: CUDA.jumprelu_encode(x, W, b, limit, 0.0, 9000, False, *more),
        lambda *more: CUDA.topk_encode(x, W, b, 9, False, *more),
        lambda *more: CUDA.batchtopk_encode(x, W, b, 2.0, 1.0, 50, False, *more),
    )
    expected = [call() for call in calls]
    library.take_waits()
    library.capture(True)
    for call, plain in zip(calls, expected, strict=True):
        assert_results(call(codes), plain)
        assert library.why_not_screened() == b"a CUDA graph cannot wait for the candidates"
    assert library.take_waits() == 0
