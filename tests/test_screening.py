"""Screened encoders give the bits of the direct ones: nothing is missed, whatever the data.

`GEMMASCOPE_FAST_SCREEN=always` screens at every size and on every instruction set, `gathered` in
the order of work that AMX has with much x, `never` not at all; the direct path is compared with
float64 in the encoders' own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import native_absent
from hypothesis import given, settings
from screening import (
    ENCODERS,
    Data,
    assert_bits,
    at_the_ulp,
    call,
    coarseness,
    compare,
    draw,
    threads,
)
from torch import Tensor

import gemmascope_fast as gsf

ABSENT = native_absent(ENCODERS)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda mode: monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)


@pytest.mark.parametrize("d", [1, 3, 16, 64, 65, 100, 384, 640, 1152])
@pytest.mark.parametrize(("n", "f"), [(1, 200), (7, 47), (8, 48), (9, 49), (33, 313), (50, 96)])
def test_sizes(screen: Callable[[str], None], n: int, d: int, f: int) -> None:
    compare(screen, draw(n, d, f))


@pytest.mark.parametrize(("n", "d", "f"), [(0, 64, 50), (5, 0, 50), (5, 64, 0)])
def test_empty(screen: Callable[[str], None], n: int, d: int, f: int) -> None:
    compare(screen, draw(n, d, f))


@pytest.mark.parametrize("name", ENCODERS)
def test_positions_in_a_thread_part_take_16_bits(screen: Callable[[str], None], name: str) -> None:
    """One thread would cut 600,000 latents into eight parts, of 75,000."""
    active = [5, 70_000, 140_001, 299_999, 300_000, 599_999]
    b = torch.zeros(600_000)
    b[active] = 1 + torch.arange(6.0)
    data = torch.ones(1, 1), torch.zeros(1, 600_000), b, torch.full((600_000,), 0.5)
    for mode in ("never", "always"):
        screen(mode)
        with threads(1):
            assert call(name, data)[1].tolist() == active


def test_several_row_blocks_and_ranges(screen: Callable[[str], None]) -> None:
    compare(screen, draw(1100, 64, 4000, rank=2.5))


def test_the_widest_models(screen: Callable[[str], None]) -> None:
    compare(screen, draw(40, 5376, 480, rank=2.5))


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("d", [64, 384, 1152, 2304])
def test_thresholds_within_an_ulp_of_the_largest_entry(
    screen: Callable[[str], None], d: int, above: bool
) -> None:
    data = at_the_ulp(draw(40, d, 300), above)
    screen("always")
    entries = call("jumprelu_encode", data, bandwidth=0.0)
    assert entries[1].numel() == (300 if above else 0)  # one token for each latent, or none
    compare(screen, data)


def outliers(scattered: bool) -> Data:
    """8 dimensions 60 times the rest."""
    x, W, b, t = draw(40, 640, 500)
    at = torch.arange(8) * 79 if scattered else torch.arange(8)
    x[:, at] *= 60
    return x, W, b, t * x.norm(dim=1).mean() / 640**0.5


def shifted(by: float) -> Data:
    x, W, b, t = draw(40, 384, 500)
    x = x + by * torch.randn(384, generator=torch.Generator().manual_seed(3))
    return x, W, b, t + (x @ W).mean(0)


def scaled(factor: float, weights: float = 1.0) -> Data:
    x, W, b, t = draw(20, 128, 300)
    return x * factor, W * weights, b * factor * weights, t * factor * weights


def integers() -> Data:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (30, 96), generator=g).float()
    W = torch.randint(-2, 3, (260, 96), generator=g).float()
    return x, W.t(), torch.zeros(260), torch.full((260,), 12.0)


def constant() -> Data:
    return torch.ones(20, 64), torch.ones(64, 100), torch.zeros(100), torch.full((100,), 63.0)


def one_row_differs() -> Data:
    x, W, b, t = draw(20, 64, 200)
    x[:] = x[0]
    x[7] *= -1
    return x, W, b, t


def zeros() -> Data:
    x, W, _, _ = draw(20, 64, 200)
    x[3:9], W.t()[10:40] = 0, 0
    b = torch.linspace(-1, 1, 200)
    return x, W, b, torch.zeros(200)


def subnormal_biases(x_zero: bool) -> Data:
    """Rows of zeros have no margin: the sign of what remains decides, however small it is."""
    x, W, _, _ = draw(20, 64, 100)
    x, W = (x * 0, W * 1e6) if x_zero else (x * 1e9, W * 0)
    b = torch.zeros(100)
    b[::25], b[1::25], b[2::25] = 1e-45, 1e-40, -1e-45  # few: more would not be screened
    return x, W, b, torch.zeros(100)


def switched_off() -> Data:
    """Most latents can never fire."""
    x, W, b, t = draw(20, 64, 200)
    t[8:] = float("inf")
    return x, W, b, t


def huge_biases() -> Data:
    x, W, b, t = draw(20, 128, 300)
    b[::3], t[::3] = 1e30, 1e30
    b[1::3], t[1::3] = -(2.0**24), -(2.0**24)
    return x, W, b, t


def every_row_its_own_size() -> Data:
    x, W, b, t = draw(40, 256, 300)
    x *= torch.logspace(-30, 30, 40)[:, None]
    W = (W.t() * torch.logspace(-20, 20, 300)[:, None]).t()
    return x, W, b, t


def chunks_of_all_sizes() -> Data:
    """Elements k % 3 share a scale; those of one are 2^-30 of the others, of one often zero."""
    x, W, b, t = draw(40, 768, 300)
    x[:, 1::3] *= 2.0**-30
    x[::2, 2::3] = 0
    W.t()[::3, 0::3] *= 2.0**-28  # these live on what is next to nothing
    W.t()[1::3, 1::3] *= 2.0**25
    return x, W, b, 2.5 * (x @ W).std(0)


def one_chunk_is_not_finite() -> Data:
    x, W, b, t = draw(20, 768, 300)
    x[3, 4], W.t()[7, 5], W.t()[200, 767] = float("inf"), float("nan"), float("-inf")
    return x, W, b, t


CASES: dict[str, Callable[[], Data]] = {
    "contiguous outliers": lambda: outliers(False),
    "scattered outliers": lambda: outliers(True),
    "common part": lambda: shifted(5.0),
    "large common part": lambda: shifted(3000.0),
    "integers": integers,
    "constant": constant,
    "one row differs": one_row_differs,
    "zeros": zeros,
    "tiny": lambda: scaled(1e-30),
    "subnormal": lambda: scaled(1e-40),
    "subnormal products": lambda: scaled(1e-22, 1e-22),
    "huge": lambda: scaled(1e30),
    "overflowing": lambda: scaled(1e30, 1e12),
    "switched off": switched_off,
    "huge biases": huge_biases,
    "every row its own size": every_row_its_own_size,
    "chunks of all sizes": chunks_of_all_sizes,
    "one chunk is not finite": one_chunk_is_not_finite,
}


@pytest.mark.parametrize("case", CASES)
def test_awkward_data(screen: Callable[[str], None], case: str) -> None:
    compare(screen, CASES[case]())


@pytest.mark.parametrize("x_zero", [True, False])
def test_subnormal_biases_beside_rows_of_zeros(screen: Callable[[str], None], x_zero: bool) -> None:
    compare(screen, subnormal_biases(x_zero), bandwidth=0.0)


@pytest.mark.parametrize(
    "case",
    ["contiguous outliers", "common part", "one row differs", "tiny"] + ["chunks of all sizes"],
)
def test_awkward_data_at_the_ulp(screen: Callable[[str], None], case: str) -> None:
    compare(screen, at_the_ulp(CASES[case](), above=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc", "threshold"])
def test_values_that_are_not_finite(
    screen: Callable[[str], None], where: str, value: float
) -> None:
    x, W, b, t = draw(20, 96, 250)
    place = {"x": x[4, 5:7], "W_enc": W.t()[[3, 100]], "b_enc": b[3:5], "threshold": t[200:203]}
    if where == "W_enc":
        W.t()[3, 7] = W.t()[100, 0] = value
    else:
        place[where].fill_(value)
    compare(screen, (x, W, b, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["x", "W_enc", "both"])
@pytest.mark.parametrize("d", [192, 200])
def test_16_bit_inputs(
    screen: Callable[[str], None], dtype: torch.dtype, which: str, d: int
) -> None:
    """Rows of whole vectors are widened on the way, others before."""
    x, W, b, t = draw(40, d, 300)
    x = x if which == "W_enc" else x.to(dtype)
    W = W if which == "x" else W.t().to(dtype).t()
    compare(screen, (x, W, b, t))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda t: t.contiguous(),
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "stepped": lambda t: t.repeat_interleave(2, 0)[::2],
    "flipped": lambda t: t.flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(screen: Callable[[str], None], layout: str) -> None:
    x, W, b, t = draw(40, 200, 300)
    compare(screen, (LAYOUTS[layout](x), LAYOUTS[layout](W), b, t))


@pytest.mark.parametrize("n", [9, 300, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_of_many_blocks(
    screen: Callable[[str], None], n: int, dtype: torch.dtype
) -> None:
    """Thousands of them, between blocks that are computed directly; the last block is not full."""
    x, W, b, t = draw(n, 320, 6001, rank=1.7)
    size = 4.0 ** (torch.arange(6001) // 48 % 4)
    W, b, t = (W * size).t().to(dtype).t(), b * size, t * size
    for begin, end in ((0, 70), (1000, 1010), (2016, 2300), (5990, 6001)):
        t[begin:end] = -2000
    compare(screen, (x, W, b, t))
    screen("gathered")
    with threads(1):
        call("jumprelu_encode", (x, W, b, t), packed=gsf.pack(W).codes)
    said = gsf.explain()
    assert said.screened_blocks + said.direct_blocks == 126
    assert said.screened_blocks > 20 and said.direct_blocks > 0


@pytest.mark.parametrize("share", [1.3, -20])
@pytest.mark.parametrize("every", [3, 4])
def test_blocks_that_fire_between_others_that_do_not(
    screen: Callable[[str], None], every: int, share: float
) -> None:
    """Each block is computed directly or screened by itself, whatever it is multiplied with."""
    x, W, b, t = draw(300, 320, 48 * 84, rank=4.5)
    t[torch.arange(48 * 84) // 48 % every == every - 1] = share - 2.6
    compare(screen, (x, W, b, t))
    codes = gsf.pack(W).codes
    for mode in ("always", "gathered"):
        screen(mode)
        with threads(1):
            call("jumprelu_encode", (x, W, b, t), packed=codes)
        said = gsf.explain()
        assert (said.direct_blocks, said.screened_blocks) == (84 // every, 84 - 84 // every)
        assert said.rescored < 300 * 20


def test_a_packed_centre_changes_no_result(screen: Callable[[str], None]) -> None:
    data = shifted(5.0)
    compare(screen, data, center=data[0].mean(0))
    compare(screen, data, center=torch.zeros(384))
    compare(screen, data, center=-data[0].mean(0))


def test_when_everything_fires(screen: Callable[[str], None]) -> None:
    """Blocks with too many candidates are computed directly."""
    x, W, b, t = draw(100, 128, 2000)
    compare(screen, (x, W, b, torch.full_like(t, -100)))
    call("jumprelu_encode", (x, W, b, torch.full_like(t, -100)))
    assert gsf.explain().direct_blocks > gsf.explain().screened_blocks
    t[1000:] = 1e30  # and again when it pays
    compare(screen, (x, W, b, t))


def test_how_few_candidates_remain(screen: Callable[[str], None]) -> None:
    """Screening would be exact without a margin worth its name too; it must also be tight."""
    screen("always")
    for case in ("gauss", "contiguous outliers", "scattered outliers"):
        x, W, b, _ = draw(200, 1152, 2000) if case == "gauss" else CASES[case]()
        b = torch.zeros_like(b)
        t = 3.1 * x.norm(dim=1).mean() / x.shape[1] ** 0.5
        entries = call("jumprelu_encode", (x, W, b, t.expand(W.shape[1])), bandwidth=0.0)
        most = 9 * coarseness() * entries[1].numel()
        assert 0 < gsf.explain().candidates < most, case


def test_latents_that_are_switched_off_cost_nothing(screen: Callable[[str], None]) -> None:
    screen("always")
    data = switched_off()
    call("jumprelu_encode", data, bandwidth=0.0)
    said = gsf.explain()
    assert said.direct_blocks == 0 and said.candidates <= 8 * data[0].shape[0], str(said)


def test_nan_has_one_form(screen: Callable[[str], None]) -> None:
    """Which of two NaN an instruction passes on is not fixed."""
    forms = torch.tensor([0x7FC00001, 0x7FC00002, -0x3FFFFD], dtype=torch.int32).view(torch.float32)
    x, W, b, t = draw(4, 64, 100)
    x[0, 3], W[3, 5], W[9, 7] = forms
    for mode in ("always", "never"):
        screen(mode)
        values = call("topk_encode", (x, W, b, t))[2]
        assert values.isnan().sum() == 12
        assert set(values[values.isnan()].view(torch.int32).tolist()) == {0x7FC00000}, mode


def test_edits_between_calls_are_seen(screen: Callable[[str], None]) -> None:
    """Nothing is kept from call to call, and `.data` edits count no version."""
    screen("always")
    x, W, b, t = draw(40, 128, 300)
    call("jumprelu_encode", (x, W, b, t))
    W.data.mul_(-1)
    found = call("jumprelu_encode", (x, W, b, t))
    screen("never")
    assert_bits(found, call("jumprelu_encode", (x, W, b, t)), "after the edit")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 150),
    f=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 20),
    shift=st.floats(-1e4, 1e4),
    rank=st.floats(-1, 4),
)
def test_any_sizes_and_scales(
    n: int, d: int, f: int, seed: int, spread: float, shift: float, rank: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, W, b, t = draw(n, d, f, seed, rank)
    x = x * torch.exp(spread * torch.rand(d, generator=g)) + shift
    W = (W.t() * torch.exp(spread * torch.rand(f, 1, generator=g))).t()
    with pytest.MonkeyPatch.context() as patch:
        compare(lambda mode: patch.setenv("GEMMASCOPE_FAST_SCREEN", mode), (x, W, b, t * 10))


# ---- one result on every instruction set and thread count

SCRIPT = """
import hashlib, torch
import screening
import test_screening as t
torch.set_num_threads({threads})
digest = hashlib.sha256()
for data in (screening.draw(130, 640, 900), t.outliers(True), t.shifted(5.0), t.integers()):
    codes = torch.ops.gemmascope_fast.pack_encoder(data[1], None)
    digest.update(codes.numpy().tobytes())
    for name in screening.ENCODERS:
        for packed in (None, codes):
            for out in screening.call(name, data, packed=packed):
                digest.update(out.numpy().tobytes())
print(digest.hexdigest(), screening.gsf.explain().path)
"""


def test_targets_and_threads_agree(run_python: Callable[..., str]) -> None:
    found: dict[tuple[str, int | str], str] = {}
    targets = ("generic", "avx2", "avx2_vnni", "avx512", "avx512_amx", "neon")
    for target in filter(available, targets):
        for count in (1, 2, 3) if target != "generic" else (2,):
            env = {"GEMMASCOPE_FAST_CPU": target, "GEMMASCOPE_FAST_SCREEN": "always"}
            found[target, count] = run_python(SCRIPT.format(threads=count), **env)
        env["GEMMASCOPE_FAST_SCREEN"] = "gathered"
        found[target, "gathered"] = run_python(SCRIPT.format(threads=2), **env)
    direct = run_python(SCRIPT.format(threads=2), GEMMASCOPE_FAST_SCREEN="never")
    expected = direct.replace("direct", "screened")
    assert direct != expected and set(found.values()) == {expected}, found


def available(target: str) -> bool:
    testing: Any = pytest.importorskip("gemmascope_fast._testing")
    return bool(testing.simd_target_available(getattr(testing.SimdTarget, target)))


def test_tile_registers_are_shared_with_torch(run_python: Callable[..., str]) -> None:
    """bfloat16 products of torch use AMX too, on the same threads, with shapes of their own."""
    if not available("avx512_amx"):
        pytest.skip("avx512_amx: not on this processor")
    code = """
import torch, screening
data = screening.draw(200, 256, 900)
a, b = torch.randn(300, 700).bfloat16(), torch.randn(700, 500).bfloat16()
seen = set()
for _ in range(20):
    acts = screening.call("jumprelu_encode", data)
    seen.add((hash((a @ b).float().numpy().tobytes()), hash(acts[2].numpy().tobytes())))
print(len(seen), screening.gsf.explain().target)
"""
    said = run_python(code, GEMMASCOPE_FAST_CPU="avx512_amx", GEMMASCOPE_FAST_SCREEN="always")
    assert said.split() == ["1", "avx512_amx"]


def test_without_leave_to_use_amx(run_python: Callable[..., str]) -> None:
    """Linux keeps AMX from a process whose signal stack is too small for the tile registers."""
    if not available("avx512_amx"):
        pytest.skip("avx512_amx: not on this processor")
    code = """
import ctypes, os
stack = ctypes.create_string_buffer(2048)
own = (ctypes.c_size_t * 3)(ctypes.addressof(stack), 0, 2048)
failed = ctypes.CDLL(None).sigaltstack(own, None)
import screening
from gemmascope_fast.doctor import machine
mode = lambda to: os.environ.update(GEMMASCOPE_FAST_SCREEN=to)
screening.compare(mode, screening.draw(40, 64, 100))
print(failed, screening.gsf.explain().target, machine.cpu()["simd_target"])
"""
    assert run_python(code, GEMMASCOPE_FAST_CPU="").split() == ["0", "avx512", "avx512"]


# ---- choosing


def test_an_unknown_mode_is_an_error(screen: Callable[[str], None]) -> None:
    screen("sometimes")
    with pytest.raises(RuntimeError, match="GEMMASCOPE_FAST_SCREEN=sometimes: expected always"):
        call("jumprelu_encode", draw(2, 16, 20))


def test_explain(screen: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMASCOPE_FAST_SCREEN", raising=False)
    call("topk_encode", draw(2, 16, 20))
    said = gsf.explain()
    assert (said.op, said.path, said.n, said.d_in, said.d_sae) == (
        "topk_encode",
        "direct",
        2,
        16,
        20,
    )
    assert said.reason in str(said) and said.reason
    screen("always")
    call("jumprelu_encode", draw(20, 16, 200))
    assert "screened int8" in str(gsf.explain()) and "candidates per token" in str(gsf.explain())
    assert gsf.explain().screened_blocks + gsf.explain().direct_blocks == 5


def test_screening_is_the_default_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMASCOPE_FAST_SCREEN", raising=False)
    call("jumprelu_encode", draw(300, 256, 1000))
    said = gsf.explain()
    assert said.path == ("screened" if said.int8 else "direct"), str(said)
