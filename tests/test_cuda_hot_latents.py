"""The hot/cold split of sae_backward, its kernels on the CPU, against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import Problem, problem, sae_backward_args
from test_cuda_passes import LARGE, full, pass_arguments, records, rows_like, run_pass, vector
from torch import Tensor

from gemmascope_fast import reference

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")

TILES = 8
ALWAYS = [0] * (TILES + 1)


@dataclass(frozen=True)
class Chosen:
    """What hot_select_kernel.cuh is given, and what it finds."""

    given: dict[str, Any]

    @property
    def rows(self) -> int:
        return int(self.given["hot"].view(np.int32)[1])

    @property
    def latents(self) -> list[int]:
        return self.given["latents"][: self.rows].tolist()

    @property
    def broken(self) -> bool:
        return bool(self.given["hot"].view(np.int32)[2])

    @property
    def slots(self) -> list[int]:
        return self.given["slots"].tolist()


def choose(
    feature_offsets: Tensor, most: int = 128, fewest: int = 1, worth: list[int] = ALWAYS
) -> Chosen:
    capacity, d_sae = int(feature_offsets[-1]), feature_offsets.shape[0] - 1
    given = dict(feature_offsets=vector(feature_offsets), capacity=capacity, fewest=fewest)
    given |= dict(worth=worth, hot=np.zeros(3, np.int64), slots=np.full(d_sae, 77, np.int32))
    given |= dict(latents=np.full(most, -9, np.int32))
    given |= dict(candidates=np.full(min(d_sae, capacity // fewest), -9, np.int32))
    testing.cuda_hot_select(given)
    return Chosen(given)


# ---- which


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("most", [1, 128, 300, 1024])
def test_the_latents_with_the_most_entries_are_hot(most: int) -> None:
    counts = torch.randint(0, 40, (1100,), generator=torch.Generator().manual_seed(0)).tolist()
    found = choose(offsets_of(counts), most, fewest=20)
    enough = [j for j, count in enumerate(counts) if count >= 20]
    wanted = sorted(enough, key=lambda j: (-counts[j], j))[:most]
    assert len(enough) > 300
    assert found.latents == wanted
    rows = {j: row for row, j in enumerate(wanted)}
    assert found.slots == [rows.get(j, -1) for j in range(1100)]


def test_the_products_must_be_worth_it() -> None:
    offsets = offsets_of([5] * 130 + [1] * 70)
    for worth, rows in ((650, 130), (651, 0)):
        found = choose(offsets, 256, fewest=5, worth=[0, 10**9, worth, *[10**9] * 6])
        assert found.rows == rows, "130 latents with 650 entries are two tiles"
    assert choose(offsets, 128, fewest=5, worth=[10**9, 640, *[10**9] * 7]).rows == 128
    assert choose(offsets, 128, fewest=6).rows == 0


def test_views_that_are_wrong_touch_no_memory() -> None:
    offsets = torch.tensor([-50, 40, -7, 90, 0, 60, 60])
    found = choose(offsets, 128, fewest=20)
    assert set(found.latents) <= set(range(6))
    assert found.rows <= 60 // 20


# ---- gradients


def split(
    args: list[Any], most: int = 128, fewest: int = 1
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Chosen]:
    """d_W_enc, d_b_enc, d_threshold, d_W_dec, d_pre; poison wherever nothing writes."""
    x, W_enc, threshold, bandwidth, W_dec, d_recon, _, offsets, indices, values, gate = args[:11]
    d_values, d_gate, feature_offsets, permutation, _ = args[11:]
    d_sae = W_dec.shape[0]
    grads = (rows_like(W_enc), full(d_sae), full(d_sae if bandwidth > 0 else 0), rows_like(W_dec))
    d_pre = torch.zeros_like(values)
    passed = dict(
        feature_offsets=feature_offsets,
        permutation=permutation,
        indices=indices,
        records=records(offsets, feature_offsets, permutation, values, gate, d_values),
        n=x.shape[0],
        **dict(x=x, g=d_recon[0], W_dec=W_dec, d_b_enc=grads[1], d_pre=d_pre, d_gate=d_gate),
        **dict(d_W_enc=grads[0].t(), d_W_dec=grads[3], threshold=threshold, bandwidth=bandwidth),
        d_threshold=grads[2] if bandwidth > 0 else None,
    )
    found = choose(feature_offsets, most, fewest)
    hot = dict(hot_slots=found.given["slots"], hot=found.given["hot"])
    testing.cuda_hot_backward(found.given, pass_arguments(**passed, **hot))
    run_pass(LARGE, 0, **passed, **hot)
    return (*grads, d_pre), found


def bf16(**sizes: int) -> Problem:
    return problem(**sizes, x_dtype=torch.bfloat16, w_dtype=torch.bfloat16)


def check(args: list[Any], most: int = 128, fewest: int = 1) -> Chosen:
    """All gradients, to 2^-16 of what they sum and a rounding to their dtype."""
    ours, found = split(args, most, fewest)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    magnitudes = [a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in wide]
    magnitudes[2] = wide[2]  # the window stays where it is
    truth = reference.sae_backward(*wide)[1:5]
    sizes = reference.sae_backward(*magnitudes)[1:5]
    for mine, right, size in zip(ours, truth, sizes, strict=False):
        bound = 2.0**-16 * size.abs() + 0.51 * torch.finfo(mine.dtype).eps * right.abs() + 1e-6
        assert torch.equal(mine.isnan(), right.isnan())
        worst = ((mine.double() - right).abs() - bound).nan_to_num(0.0, 0.0, 0.0)
        assert not worst.numel() or float(worst.max()) <= 0
    return found


def test_gradients_of_hot_and_cold_latents() -> None:
    args = sae_backward_args(bf16(n=70, d_in=72, d_sae=20, d_out=40))
    counts = args[13].diff()
    fewest = int(counts.median())
    found = check(args, fewest=fewest)
    assert 0 < found.rows < 20
    assert found.rows == int((counts >= fewest).sum())


@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "d_out", "most"),
    [(1, 8, 3, 8, 128), (33, 64, 5, 128, 128), (64, 8, 150, 16, 256), (257, 264, 6, 24, 128),
     (130, 24, 140, 520, 128)],
)  # fmt: skip
def test_gradients_of_every_size(n: int, d_in: int, d_sae: int, d_out: int, most: int) -> None:
    found = check(sae_backward_args(bf16(n=n, d_in=d_in, d_sae=d_sae, d_out=d_out)), most)
    assert found.rows == min(most, sum(slot >= 0 for slot in found.slots))
    assert found.rows > 0 and not found.broken


def test_a_latent_that_fires_on_every_token() -> None:
    p = bf16(n=300, d_in=16, d_sae=5, d_out=8)
    always = p.b_enc.clone()
    always[2] = 50
    found = check(sae_backward_args(p.with_(b_enc=always)), fewest=290)
    assert found.latents == [2]


def test_rows_that_lie_apart() -> None:
    p = bf16(n=40, d_in=16, d_sae=9, d_out=24)
    x, W_dec = (F.pad(t, (0, 8), value=float("nan"))[:, :-8] for t in (p.x, p.W_dec))
    assert check(sae_backward_args(p.with_(x=x, W_dec=W_dec))).rows == 9


def test_without_a_window_and_without_other_gradients() -> None:
    args = sae_backward_args(bf16(n=40, d_in=16, d_sae=9, d_out=24), bandwidth=0.4)
    args[2], args[3], args[11], args[12] = None, 0.0, None, None
    assert check(args).rows == 9


def test_cold_latents_have_the_bits_of_the_pass_and_hot_ones_those_of_every_run() -> None:
    args = sae_backward_args(bf16(n=70, d_in=24, d_sae=20, d_out=40))
    fewest = int(args[13].diff().median())
    (first, found), (second, _) = split(args, fewest=fewest), split(args, fewest=fewest)
    passed, none = split(args, fewest=10**6)
    assert none.rows == 0 < found.rows
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(first[4], passed[4], rtol=1e-4, atol=1e-5)
    cold = torch.tensor([slot < 0 for slot in found.slots])
    assert torch.equal(first[0].t()[cold], passed[0].t()[cold])
    for one, other in zip(first[1:4], passed[1:4], strict=True):
        assert torch.equal(one[cold], other[cold])
    assert not torch.equal(first[1], passed[1]), "the products served nobody"


# ---- what is not finite


@pytest.mark.parametrize("where", ["x", "d_recon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_reach_only_their_entries(where: str, value: float) -> None:
    args = sae_backward_args(bf16(n=70, d_in=72, d_sae=20, d_out=40))
    rows = args[0] if where == "x" else args[5][0]
    rows[69, 3] = value
    found = check(args)
    assert found.broken
    d_W_enc, _, _, d_W_dec, _ = split(args)[0]
    fires = torch.zeros(20, dtype=torch.bool)
    fires[args[8][args[7][69] :].long()] = True
    assert 0 < fires.sum() < 20
    gradient = d_W_enc.t() if where == "x" else d_W_dec
    assert bool(gradient[~fires].isfinite().all())


def test_latents_whose_vector_is_not_finite_spoil_only_themselves() -> None:
    args = sae_backward_args(bf16(n=40, d_in=16, d_sae=9, d_out=24))
    args[4][3, 5] = float("nan")
    found = check(args)
    assert found.rows == 9 and found.slots.count(-1) == 1 and found.slots[3] == -1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e38])
@pytest.mark.parametrize("number", [9, 11])  # values, d_values
def test_coefficients_that_bfloat16_cannot_split_go_to_the_pass(number: int, value: float) -> None:
    args = sae_backward_args(bf16(n=40, d_in=16, d_sae=9, d_out=24))
    entry = int((args[10] > 0).nonzero()[7])
    args[number][entry] = value
    (first, found), (passed, _) = split(args), split(args, fewest=10**6)
    latent = int(args[8][entry])
    assert found.slots[latent] == -1 and found.slots.count(-1) == 1
    assert torch.equal(first[0].t()[latent].isnan(), passed[0].t()[latent].isnan())
    assert torch.equal(first[3][latent].isnan(), passed[3][latent].isnan())
    others = [j for j in range(9) if j != latent]
    assert bool(first[0].t()[others].isfinite().all() and first[3][others].isfinite().all())


def test_a_token_that_occurs_twice_in_a_latent_is_a_sum() -> None:
    args = sae_backward_args(bf16(n=40, d_in=16, d_sae=9, d_out=24))
    entry = next(e for e in range(1, 99) if e not in args[7] and args[8][e - 1] < args[8][e])
    latent = int(args[8][entry])
    args[8][entry - 1] = latent  # now the row has it twice
    args[13], args[14] = reference.by_feature(args[7], args[8], 9)
    found = check(args)
    assert found.slots[latent] == -1 and found.slots.count(-1) == 1


# ---- what it costs


def log_normal(d_sae: int, l0: float) -> Tensor:
    """Firing rates of a trained dictionary, descending: sigma = 2 nats."""
    normal = torch.special.ndtri((torch.arange(d_sae, dtype=torch.float64) + 0.5) / d_sae)
    weights = (2 * normal).exp().flip(0)
    return weights * (l0 / weights.sum())


@pytest.mark.parametrize(("d_sae", "l0"), [(16384, 64), (65536, 64), (65536, 128)])
def test_what_pays_at_the_measured_shapes(d_sae: int, l0: int) -> None:
    n, d = 8192, 5376
    most, worth, scratch = testing.cuda_hot_work(n, d, d, d_sae, 132)
    assert most == 6 * 128, "21 columns of tiles, 132 processors: 6 rows of tiles are one wave"
    entries = n * log_normal(d_sae, l0)[:most]
    assert float(entries[-1]) > n / 128
    assert float(entries.sum()) > 1.2 * worth[5]
    assert n * l0 / d_sae < n / 128 or l0 > 64, "latents that fire alike are none"
    assert scratch < 2 * n * (2 * d) * 2


@pytest.mark.parametrize("part", [1e-4, 0.003, 0.0117, 0.047, 0.4])
def test_the_share_of_the_hottest_is_that_of_log_normal_rates(part: float) -> None:
    rates = log_normal(2**20, 1.0)
    share = float(rates[: round(part * 2**20)].sum() / rates.sum())
    assert testing.cuda_hot_share(part) == pytest.approx(share, abs=0.01)


def test_the_question_is_asked_where_the_answer_is_usually_yes() -> None:
    def asked(d_sae: int, l0: int, n: int = 8192) -> bool:
        return testing.cuda_hot_expected(n, 5376, 5376, d_sae, 132, n * l0)

    assert [asked(2**14, 64), asked(2**16, 64), asked(2**16, 128)] == [True, False, True]
    assert not any(asked(2**18, l0) for l0 in (16, 64, 128)) and not asked(2**14, 16)
    assert not asked(512, 4) and asked(512, 200), "all latents fit into the panels"


def test_the_cost_is_that_of_its_waves() -> None:
    most, worth, _ = testing.cuda_hot_work(8192, 5376, 5376, 16384, 132)
    tile = 2 * 128 * 256 * 132 / 690e12
    for tiles, waves_of_tokens, waves_of_columns in ((1, 1, 1), (6, 2, 1), (7, 2, 2), (8, 2, 2)):
        products = tile * (waves_of_tokens * 5376 + 2 * waves_of_columns * 2 * 8192)
        moved = (4 * 8192 * 2 * 5376 + 20 * 8192 * 128 * tiles) / 3e12
        seconds = 4e-5 + products + moved
        assert worth[tiles - 1] == pytest.approx(seconds * 4.5e12 / (4 * 5376), abs=1)
    assert testing.cuda_hot_work(8192, 1152, 1152, 16384, 132)[0] == 1024
    assert testing.cuda_hot_work(8192, 1152, 1152, 300, 132)[0] == 384
    assert testing.cuda_hot_work(8192, 2**16, 8, 16384, 132)[0] == 128
