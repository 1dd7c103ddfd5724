"""The bound of screening where it is attained: no random data comes near the worst case.

    X . W - P = (S q) . dW + dX . W

is |S q| |dW| or |dX| |W| where one factor has the signs of the other and both the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import native_absent
from screening import ENCODERS, Data, assert_bits, call, threads, token_code
from torch import Tensor

import gemmascope_fast as gsf

ABSENT = native_absent(ENCODERS)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
LATENTS = 20
"""Enough for the second stage, and a remainder that goes without it."""


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda mode: monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)


def block_of(d: int) -> int:
    return math.gcd(d, 256)


def chunk_of(d: int) -> int:
    block = block_of(d)
    return next(c for c in range(block, d + 1, block) if d % c == 0 and (c >= 256 or c == d))


def hadamard(d: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < block_of(d):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def rotated(X: Tensor) -> Tensor:
    """Rows x with H x = X; element t * (d / block) + c is place t of transform c."""
    d, H = X.shape[1], hadamard(X.shape[1])
    places = X.double().view(len(X), -1, len(H)) @ H / len(H)
    return places.transpose(1, 2).reshape(len(X), d).float()


def transformed(x: Tensor) -> Tensor:
    """H x, which `rotated` undoes."""
    H = hadamard(x.shape[1])
    places = x.double().view(len(x), len(H), -1).transpose(1, 2)
    return (places @ H).reshape(len(x), -1).float()


def attained(d: int, of_x: bool, left_over: float) -> tuple[Data, Tensor]:
    """One token, zeros around it, whose entries are a whole margin above P; those margins.

    One side has the largest code everywhere, the other is left_over above its codes, with signs
    such that all of it adds up.
    """
    most = token_code() if of_x else 127
    g = torch.Generator().manual_seed(d)
    chunk = chunk_of(d)
    scale = torch.exp2(torch.randint(-3, 4, (d // chunk,), generator=g)).repeat_interleave(chunk)
    sign = torch.randint(0, 2, (1, d), generator=g) * 2 - 1
    first = torch.arange(d) % chunk == 0  # the largest of each chunk, with nothing left over
    codes = torch.randint(1, most - 20, (1 if of_x else LATENTS, d), generator=g) + left_over
    coded = torch.where(first, most, codes) * sign * scale
    flat = 127 * sign * scale
    if of_x:
        flat = flat * torch.exp2(torch.arange(LATENTS) - 8)[:, None]
    x, W = torch.zeros(8, d), rotated(flat if of_x else coded)
    x[5] = rotated(coded if of_x else flat)[0]
    margin = (flat.abs() * ~first * left_over * scale).sum(1) / block_of(d)
    limit = gsf.pre_at(
        x, W.t(), torch.zeros(LATENTS), torch.full((LATENTS,), 5), torch.arange(LATENTS)
    )
    return (x, W.t(), torch.zeros(LATENTS), limit), margin.expand(LATENTS)


def compare_at(screen: Callable[[str], None], data: Data, entries: int) -> None:
    """JumpReLU with thresholds an ulp lower than the limits: as many entries, none missed."""
    x, W, b, limit = data
    data = x, W, b, torch.nextafter(limit, torch.tensor(-torch.inf))
    screen("never")
    expected = call("jumprelu_encode", data, bandwidth=0.0)
    assert expected[1].numel() == entries
    packed = torch.ops.gemmascope_fast.pack_encoder(W, None)
    for mode, codes in (("gathered", packed), ("always", None), ("always", packed)):
        screen(mode)
        found = call("jumprelu_encode", data, bandwidth=0.0, packed=codes)
        assert_bits(found, expected, mode if codes is not None else "unpacked")
        assert gsf.explain().screened_blocks == -(-W.shape[1] // 48)


@pytest.mark.parametrize("of_x", [False, True], ids=["error of W", "error of x"])
@pytest.mark.parametrize("d", [64, 128, 256, 384, 640, 1152, 5376])
def test_entries_a_whole_margin_above_their_product(
    screen: Callable[[str], None], d: int, of_x: bool
) -> None:
    data, margin = attained(d, of_x, 255 / 512)
    compare_at(screen, data, LATENTS)
    x, W, b, limit = data
    call("jumprelu_encode", (x, W, b, limit + margin / 64), bandwidth=0.0)
    assert gsf.explain().candidates == 0  # the margin is that, and no more


@pytest.mark.parametrize("op", ["topk_encode", "batchtopk_encode"])
@pytest.mark.parametrize("d", [256, 640, 5376])
@pytest.mark.parametrize("of_x", [False, True], ids=["error of W", "error of x"])
def test_selected_entries_a_whole_margin_above_what_codes_say(
    screen: Callable[[str], None], op: str, d: int, of_x: bool
) -> None:
    """Beside as many a little below them whose codes are right: those set the limit."""
    fine = 2 * token_code()
    left_over = (fine * 100 // 254 + 0.498) / fine if of_x else 255 / 512
    x, W, _, limit = attained(d, of_x, left_over)[0]
    value, rows = float(limit.max()), torch.zeros(2_000, d)
    rows[96 : 96 + LATENTS] = W.t() * (value / limit)[:, None]  # 16 have a second stage
    right = x[5:6]
    if of_x:  # half of its signs, so that what is left over adds up to nothing
        codes = transformed(right).view(-1, chunk_of(d))
        large = codes.abs() > codes.abs().median(1, keepdim=True).values
        right = rotated((codes.sign() * torch.where(large, 1, -1)).view(1, d))
    rows[1_000 : 1_000 + LATENTS] = right * (0.9995 * value / float(right @ x[5]))
    b, count = torch.zeros(2_000), 1.0 * LATENTS
    given = (LATENTS,) if op == "topk_encode" else (count / len(x), None, None)
    encode = getattr(torch.ops.gemmascope_fast, op)
    screen("never")
    expected = encode(x, rows.t(), b, *given, True, None)
    assert (expected[2] > 0.9999 * value).sum() == LATENTS
    packed = torch.ops.gemmascope_fast.pack_encoder(rows.t(), None)
    for mode, codes in (("gathered", packed), ("always", packed), ("always", None)):
        screen(mode)
        assert_bits(encode(x, rows.t(), b, *given, True, codes), expected, op)
        assert gsf.explain().screened_blocks > 0


@pytest.mark.parametrize("d", [64, 256, 640, 1152])
def test_entries_a_whole_margin_above_the_second_stage(
    screen: Callable[[str], None], d: int
) -> None:
    """What the fine codes leave is half of one, everywhere."""
    fine = 2 * token_code()
    compare_at(screen, attained(d, True, (fine * 100 // 254 + 0.498) / fine)[0], LATENTS)


def test_second_stages_of_several_blocks(screen: Callable[[str], None]) -> None:
    """The same in each of 40 blocks, of other sizes: five to a task."""
    fine, count = 2 * token_code(), 40
    x, W, _, limit = attained(640, True, (fine * 100 // 254 + 0.498) / fine)[0]
    blocks, limits = torch.zeros(count, 48, 640), torch.full((count, 48), 1e30)
    for i in range(count):
        place = slice(14 * (i % 3), 14 * (i % 3) + LATENTS)  # 16 of them quantised together
        blocks[i, place], limits[i, place] = W.t() * 4.0 ** (i % 5), limit * 4.0 ** (i % 5)
    with threads(1):
        data = x, blocks.flatten(0, 1).t(), torch.zeros(count * 48), limits.flatten()
        compare_at(screen, data, count * LATENTS)


@pytest.mark.parametrize("d", [5376, 16064])
def test_dots_whose_every_rounding_goes_up(screen: Callable[[str], None], d: int) -> None:
    """Lanes add 0.51 ulp more than a whole number of them d / 16 times; the codes are exact."""
    top = 2 ** math.ceil(math.log2(d / 16))
    whole = torch.linspace(0.6, 0.99, LATENTS, dtype=torch.float64) * top / (d / 16) * 2**24 / top
    product = ((whole.floor() + 0.51) * top / 2**24).float()
    x, W = torch.ones(8, d), product[:, None].repeat(1, d)
    x[1::2] = -1
    zero = torch.zeros(LATENTS)
    limit = gsf.pre_at(x, W.t(), zero, zero.long(), torch.arange(LATENTS))
    above = (limit.double() / product.double() / d - 1).max()
    assert above > d / 100 * 2**-24
    compare_at(screen, (x, W.t(), zero, limit), 4 * LATENTS)


def test_short_codes_keep_the_bounds(run_python: Callable[..., str]) -> None:
    """AVX2 alone holds tokens in codes up to 63: the same attained bounds, in its own process."""
    testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
    if not testing.simd_target_available(testing.SimdTarget.__members__["avx2"]):
        pytest.skip("avx2: not on this processor")
    code = (
        "import pytest, screening, test_screen_bounds as t\n"
        "with pytest.MonkeyPatch.context() as patch:\n"
        "    screen = lambda mode: patch.setenv('GEMMASCOPE_FAST_SCREEN', mode)\n"
        "    for d in (64, 640, 5376):\n"
        "        t.test_entries_a_whole_margin_above_their_product(screen, d, True)\n"
        "        t.test_entries_a_whole_margin_above_the_second_stage(screen, d)\n"
        "print(screening.token_code())"
    )
    assert run_python(code, GEMMASCOPE_FAST_CPU="avx2").strip() == "63"
