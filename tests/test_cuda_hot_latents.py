"""The hot/cold split of sae_backward, its kernels on the CPU, against the pass and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
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
