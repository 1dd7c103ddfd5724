"""Properties that hold for every input, on inputs that hypothesis chooses."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import assert_same, check_csr
from samples import DTYPES, Problem, problem
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import SparseActs

OPS = ("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode", "by_feature")
ENCODERS = ["jumprelu", "window", "topk", "batchtopk"]

few = settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `backend` is the same for all
)
pytestmark = pytest.mark.filterwarnings("ignore:float16 overflows at 65504")


@st.composite
def problems(draw: st.DrawFn, integer: bool | None = None) -> Problem:
    """Sizes from 0 or 1 up, whole or real numbers, and a special value in one place."""
    sizes = [draw(st.integers(low, high)) for low, high in ((0, 9), (1, 40), (1, 70), (1, 20))]
    whole = draw(st.booleans()) if integer is None else integer
    dtypes = {"x_dtype": draw(st.sampled_from(DTYPES)), "w_dtype": draw(st.sampled_from(DTYPES))}
    p = problem(*sizes, integer=whole, seed=draw(st.integers(0, 99)), **dtypes)
    special = draw(st.sampled_from([None, 0.0, -0.0, math.nan, math.inf, -math.inf]))
    if special is not None and p.x.numel() and integer is None:
        p.x.view(-1)[draw(st.integers(0, p.x.numel() - 1))] = special
    return p


def encode(kind: str, p: Problem, x: Tensor | None = None, k: int = 3) -> SparseActs:
    encoder = p.x if x is None else x, p.W_enc, p.b_enc
    if kind == "topk":
        return gsf.topk_encode(*encoder, min(k, p.W_enc.shape[1]))
    if kind == "batchtopk":
        return gsf.batchtopk_encode(*encoder, k - 0.5)
    threshold = p.threshold.clone().requires_grad_(kind == "window")
    return gsf.jumprelu_encode(*encoder, threshold, bandwidth=0.5 if kind == "window" else 0.0)


def assert_same_acts(ours: SparseActs, expected: SparseActs) -> None:
    assert ours.shape == expected.shape
    for name in ("offsets", "indices", "values", "gate"):
        assert_same(getattr(ours, name).detach(), getattr(expected, name).detach(), name)


@pytest.mark.parametrize("kind", ENCODERS)
@few
@given(p=problems(), k=st.integers(1, 80))
def test_entries_are_csr(backend: Any, kind: str, p: Problem, k: int) -> None:
    n, d_sae = p.x.shape[0], p.W_enc.shape[1]
    p.W_enc.requires_grad_()
    acts = encode(kind, p, k=k)
    check_csr((acts.offsets, acts.indices, acts.values, acts.gate, *acts.by_feature()), n, d_sae)
    off = acts.gate == 0
    assert bool((acts.values[off] == 0).all()) and bool(((acts.gate == 1) | off).all())
    if kind == "topk":
        assert acts.offsets.tolist() == [i * min(k, d_sae) for i in range(n + 1)]
    if kind == "batchtopk":
        assert acts.nnz <= int((k - 0.5) * n) and not bool(off.any())
    if kind == "jumprelu":
        assert not bool(off.any())


@pytest.mark.parametrize("kind", ["jumprelu", "window", "topk"])
@few
@given(p=problems(), order=st.randoms(use_true_random=False))
def test_rows_are_independent(backend: Any, kind: str, p: Problem, order: Any) -> None:
    """Tokens in another order and another company have the same entries."""
    rows = list(range(p.x.shape[0]))
    order.shuffle(rows)
    rows = rows[: (len(rows) + 1) // 2]
    shuffled, expected = encode(kind, p, p.x[rows]), encode(kind, p)[rows]
    if backend.native:
        assert_same_acts(shuffled, expected)
    else:  # BLAS may sum in another order
        torch.testing.assert_close(
            shuffled.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("kind", ["jumprelu", "window", "topk"])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
@few
@given(p=problems())
def test_a_token_alone_encodes_as_in_its_batch(backend: Any, kind: str, p: Problem) -> None:
    """Bit for bit: a promise of the compiled library, BLAS makes none."""
    acts = encode(kind, p)
    for i in range(p.x.shape[0]):
        assert_same_acts(encode(kind, p, p.x[i]), acts[i])


@few
@given(p=problems(integer=True), a=st.integers(-4, 4), b=st.integers(-4, 4))
def test_decode_is_linear(backend: Any, p: Problem, a: int, b: int) -> None:
    """`decode(a u + b v) = a decode(u) + b decode(v)` over one support; whole numbers: exactly."""
    first = encode("topk", p).detach()
    second = first._replace(values=(first.values.flip(0) + 1).detach())
    mixed = first._replace(values=a * first.values + b * second.values)
    u, v, w = (gsf.decode(t, p.W_dec, dtype=torch.float32) for t in (first, second, mixed))
    assert_same(w, a * u + b * v)
    with_bias = gsf.decode(first, p.W_dec, p.b_dec, dtype=torch.float32)
    assert_same(with_bias, u + p.b_dec)


@pytest.mark.parametrize("kind", ENCODERS)
@few
@given(p=problems(integer=True), power=st.integers(-6, 6))
def test_powers_of_two_scale_through(backend: Any, kind: str, p: Problem, power: int) -> None:
    """Scaling x, bias, threshold and window by 2^power scales the activations, nothing else."""
    scale = 2.0**power
    scaled = p.with_(x=p.x * scale, b_enc=p.b_enc * scale, threshold=p.threshold * scale)
    acts = encode(kind, p)
    if kind == "window":
        threshold = scaled.threshold.requires_grad_()
        found = gsf.jumprelu_encode(*scaled.encoder, threshold, bandwidth=0.5 * scale)
    else:
        found = encode(kind, scaled)
    assert_same_acts(found, acts._replace(values=acts.values * scale))


@few
@given(p=problems(), kind=st.sampled_from(["jumprelu", "batchtopk"]))
def test_from_dense_inverts_to_dense(backend: Any, p: Problem, kind: str) -> None:
    acts = encode(kind, p)
    active = acts._keep(acts.values != 0)  # a pre-activation of 0 above a negative threshold
    assert_same_acts(SparseActs.from_dense(acts.to_dense()), active)


@few
@given(p=problems(), k=st.integers(0, 12))
def test_topk_of_topk_and_from_topk_of_as_topk(backend: Any, p: Problem, k: int) -> None:
    k = min(k, p.W_enc.shape[1])
    acts = gsf.topk_encode(*p.encoder, k)
    assert_same_acts(acts.topk(k), acts._keep(acts.gate > 0))
    assert_same_acts(acts.topk(k + 5), acts.topk(k))
    if p.x.shape[0]:
        rebuilt = SparseActs.from_topk(*acts.as_topk(), p.W_enc.shape[1])
        assert_same_acts(rebuilt, acts)
