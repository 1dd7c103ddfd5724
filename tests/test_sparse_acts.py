"""SparseActs: construction, sums, selections and exports against dense tensors, with gradients.

Every case exists exactly sized and padded; the padding holds NaN and impossible latents. Values are
whole numbers, so that sums are exact and compared bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import assert_same, check_feature_view
from torch import Tensor

from gemmascope_fast import CapacityError, SparseActs

OPS = ("by_feature",)
SHAPES = [(7,), (5, 7), (2, 3, 7), (2, 1, 3, 7), (1, 1), (0, 7), (3, 0), (2, 0, 5), (0, 0)]
FILLED = [shape for shape in SHAPES if math.prod(shape)]


@dataclass
class Case:
    """The same activations twice: sparse, and dense as a function of the same leaves."""

    acts: SparseActs
    dense: Tensor
    gate: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.acts.values, self.acts.gate]


def make(shape: tuple[int, ...], padding: int = 0, window: bool = True, seed: int = 1) -> Case:
    """About 40 % stored; with `window`, a quarter of the entries is off (value 0, gate 0)."""
    g = torch.Generator().manual_seed(seed)
    n, d_sae = math.prod(shape[:-1]), shape[-1]
    where = (torch.rand(n, d_sae, generator=g) < 0.4).nonzero(as_tuple=True)
    nnz = where[0].shape[0]
    gate = torch.ones(nnz)
    if window:
        gate[torch.rand(nnz, generator=g) < 0.25] = 0
    values = torch.randperm(nnz, generator=g).add(1.0) * (torch.arange(nnz) % 3 - 1).sign().add(0.5)
    garbage = torch.full((padding,), torch.nan)
    values = torch.cat([2 * values * gate, garbage]).requires_grad_()
    gate = torch.cat([gate, garbage]).requires_grad_()
    latents = torch.cat([where[1], torch.arange(padding) * 1000 - 7]).to(torch.int32)
    offsets = torch.tensor([0, *torch.bincount(where[0], minlength=n).cumsum(0).tolist()])
    acts = SparseActs(offsets, latents, values, gate, shape, padded=padding > 0)
    dense, dense_gate = (
        torch.zeros(n, d_sae).index_put(where, t[:nnz]).reshape(shape) for t in (values, gate)
    )
    return Case(acts, dense, dense_gate)


def assert_equal(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Equal values, and equal gradients of the leaves for a whole-number output gradient."""
    assert_same(ours, expected)
    seed = (torch.arange(ours.numel(), dtype=ours.dtype) % 5 - 2).reshape(ours.shape)
    found, wanted = (
        torch.autograd.grad(t, leaves, seed, retain_graph=True, materialize_grads=True)
        for t in (ours, expected)
    )
    for mine, other, name in zip(found, wanted, ("d_values", "d_gate"), strict=False):
        assert_same(mine, other, name)


@pytest.fixture(params=[0, 9], ids=["exact", "padded"])
def padding(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_ignore_the_padding(shape: tuple[int, ...], padding: int) -> None:
    acts = make(shape, padding).acts
    assert (acts.shape, acts.n, acts.d_sae) == (shape, math.prod(shape[:-1]), shape[-1])
    assert acts.nnz == acts.indices.shape[0] - padding
    assert (acts.dtype, acts.device.type) == (torch.float32, "cpu")
    assert f"shape={shape}, capacity={acts.nnz + padding}, dtype=torch.float32" in repr(acts)
    assert acts.tokens()[acts.nnz :].tolist() == [acts.n] * padding
    assert acts.latents()[acts.nnz :].tolist() == [acts.d_sae] * padding


@pytest.mark.parametrize("shape", SHAPES)
def test_to_dense(shape: tuple[int, ...], padding: int) -> None:
    case = make(shape, padding)
    assert_equal(case.acts.to_dense(), case.dense, case.leaves)


@pytest.mark.parametrize("shape", SHAPES)
def test_l0_counts_and_fired_sum_the_gate(shape: tuple[int, ...], padding: int) -> None:
    case = make(shape, padding)
    flat = case.gate.reshape(case.acts.n, case.acts.d_sae)
    assert_equal(case.acts.l0(), case.gate.sum(-1), case.leaves)
    assert_equal(case.acts.counts(), flat.sum(0), case.leaves)
    assert_same(case.acts.fired(), flat.detach().sum(0) > 0)


@pytest.mark.parametrize("shape", FILLED)
def test_max_over_tokens(shape: tuple[int, ...], padding: int) -> None:
    case = make(shape, padding, window=False)
    flat = case.dense.reshape(case.acts.n, case.acts.d_sae)
    assert_equal(case.acts.max_over_tokens(), flat.amax(0), case.leaves)


def test_max_over_tokens_of_a_latent_on_everywhere_may_be_negative() -> None:
    dense = torch.tensor([[-2.0, 3.0, 0.0], [-1.0, 0.0, torch.nan]])
    found = SparseActs.from_dense(dense).max_over_tokens()
    assert_same(found, torch.tensor([-1.0, 3.0, torch.nan]))
    none = SparseActs.from_dense(torch.zeros(0, 3)).max_over_tokens()
    assert_same(none, torch.zeros(3))


def dense_topk(case: Case, k: int) -> Tensor:
    """The k largest active entries of each row, by a Python sort."""
    keep = torch.zeros_like(case.dense)
    rows, gates = (
        t.detach().reshape(-1, case.acts.d_sae).tolist() for t in (case.dense, case.gate)
    )
    for i, (row, gate) in enumerate(zip(rows, gates, strict=True)):
        active = [j for j, on in enumerate(gate) if on]
        order = sorted(active, key=lambda j, row=row: (not math.isnan(row[j]), -row[j], j))
        keep.view(-1, case.acts.d_sae)[i, order[:k]] = 1
    return case.dense * keep


@pytest.mark.parametrize("k", [0, 1, 2, 50])
@pytest.mark.parametrize("shape", FILLED)
def test_topk(shape: tuple[int, ...], k: int, padding: int) -> None:
    case = make(shape, padding)
    kept = case.acts.topk(k)
    assert_equal(kept.to_dense(), dense_topk(case, k), case.leaves)
    assert_same(kept.l0(), case.gate.sum(-1).clamp(max=k))


def test_topk_puts_nan_first_and_ties_to_the_smaller_latent() -> None:
    acts = SparseActs.from_dense(torch.tensor([[2.0, 5, 2, 5], [1, torch.nan, 9, 0], [0, 0, 0, 3]]))
    assert acts.topk(1).indices.tolist() == [1, 1, 3]
    assert acts.topk(3).indices.tolist() == [0, 1, 3, 0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"topk: k must be >= 0, got -1"):
        acts.topk(-1)


INDEXERS: list[Any] = [
    *(0, -1, slice(1, None), slice(None, None, 2), slice(0, 0), [1, 0, 1]),
    *(torch.tensor([1, -1]), torch.tensor([], dtype=torch.int64), (1, 2), (0, slice(1, 3))),
    *(Ellipsis, (None, 1), torch.tensor([[True, False, True], [False, False, True]])),
]


@pytest.mark.parametrize("rows", INDEXERS, ids=str)
def test_getitem_selects_tokens_like_a_dense_tensor(rows: Any, padding: int) -> None:
    case = make((2, 3, 7), padding)
    chosen = case.acts[rows]
    assert chosen.shape == case.dense[rows].shape
    assert_equal(chosen.to_dense(), case.dense[rows], case.leaves)
    assert_equal(chosen.l0(), case.gate[rows].sum(-1), case.leaves)


def test_getitem_outside_the_batch_is_an_error() -> None:
    with pytest.raises(IndexError):
        make((2, 3, 7)).acts[2]
    with pytest.raises(IndexError):
        make((2, 3, 7)).acts[0, 0, 0]
    assert [row.shape for row in make((2, 3, 7)).acts] == [(3, 7), (3, 7)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("shape", SHAPES)
def test_to_sparse_csr_leaves_out_what_is_off(shape: tuple[int, ...], padding: int) -> None:
    case = make(shape, padding)
    csr = case.acts.to_sparse_csr()
    flat = case.gate.detach().reshape(case.acts.n, case.acts.d_sae)
    assert csr.values().shape[0] == int(flat.sum())
    assert_same(csr.detach().to_dense(), case.dense.detach().reshape(flat.shape))


def test_as_topk_views_the_entries(padding: int) -> None:
    dense = torch.tensor([[[0.0, 2, 3], [4, 0, 5]], [[6, 7, 0], [0, 8, 9]]], requires_grad=True)
    exact = SparseActs.from_dense(dense)
    pad = torch.nn.functional.pad
    arrays = (pad(t, (0, padding), value=3) for t in (exact.indices, exact.values, exact.gate))
    acts = SparseActs(exact.offsets, *arrays, exact.shape, padded=padding > 0)
    values, indices = acts.as_topk()
    assert_equal(values, dense[dense != 0].view(2, 2, 2), [dense])
    assert indices.tolist() == [[[1, 2], [0, 2]], [[0, 1], [1, 2]]]
    assert values.data_ptr() == acts.values.data_ptr()
    assert indices.data_ptr() == acts.indices.data_ptr()
    with pytest.raises(ValueError, match="as_topk: rows have different numbers of entries"):
        SparseActs.from_dense(torch.eye(3)[[0, 0, 1]] + torch.eye(3)).as_topk()
    assert [t.shape for t in make((0, 7)).acts.as_topk()] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_from_dense_stores_what_is_not_zero(dtype: torch.dtype) -> None:
    dense = torch.tensor([[0.0, -0.0, torch.nan, 2], [-3, 0, 1e-5, torch.inf]], dtype=dtype)
    dense.requires_grad_()
    acts = SparseActs.from_dense(dense)
    assert (acts.offsets.tolist(), acts.indices.tolist()) == ([0, 2, 5], [2, 3, 0, 2, 3])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert acts.values.dtype == acts.gate.dtype == wide
    assert acts.gate.tolist() == [1.0] * 5
    assert_same(acts.to_dense(), dense.to(wide))
    (gradient,) = torch.autograd.grad(acts.values, dense, torch.arange(5, dtype=wide))
    assert_same(gradient, torch.tensor([[0, 0, 0, 1], [2, 0, 3, 4]], dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_from_dense_inverts_to_dense(shape: tuple[int, ...]) -> None:
    case = make(shape, window=False)
    acts = SparseActs.from_dense(case.dense)
    assert_same(acts.offsets, case.acts.offsets)
    assert_same(acts.indices, case.acts.indices)
    assert_same(acts.values, case.acts.values)


def test_from_dense_refuses_what_is_not_a_float_matrix() -> None:
    with pytest.raises(TypeError, match="dense must be a floating-point tensor, got torch.int"):
        SparseActs.from_dense(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="from_dense: dense must have at least one dimension"):
        SparseActs.from_dense(torch.tensor(1.0))


def test_by_feature_is_computed_once(backend: Any, padding: int) -> None:
    acts = make((2, 3, 7), padding).acts
    first, second = acts.by_feature(), acts.by_feature()
    check_feature_view(*first, acts.offsets, acts.indices, 7)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert acts.detach().by_feature()[1] is first[1]  # same entries, same view
    assert acts[:1].feature_offsets is None


def test_check_raises_when_the_capacity_was_too_small() -> None:
    case = make((5, 7), padding=4)
    assert case.acts.check() is case.acts
    capacity = case.acts.indices.shape[0]
    case.acts.needed = torch.tensor(capacity)
    assert case.acts.check() is case.acts
    case.acts.needed = torch.tensor(capacity + 1)
    with pytest.raises(CapacityError, match=rf"pass max_nnz >= {capacity + 1}"):
        case.acts.check()
