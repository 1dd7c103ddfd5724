"""SparseActs: construction from top-k pairs, edits, pytrees and copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from oracle import assert_same
from test_sparse_acts import Case, assert_equal, make
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import SparseActs

FIELDS = ("offsets", "indices", "values", "gate")
OPTIONAL = ("needed", "threshold", "feature_offsets", "permutation")


@pytest.fixture(params=[0, 9], ids=["exact", "padded"])
def case(request: pytest.FixtureRequest) -> Case:
    return make((2, 3, 7), request.param)


def assert_canonical(acts: SparseActs) -> None:
    """Exactly sized, and latents ascend inside every token."""
    assert not acts.padded and acts.indices.shape[0] == int(acts.offsets[-1])
    assert bool((acts._keys().diff() > 0).all())


# ---- from_topk


@pytest.mark.parametrize("batch", [(), (4,), (2, 2), (0,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_topk_accepts_any_order(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    indices = torch.rand(*batch, 9).argsort(-1)[..., :4]
    values = torch.randint(1, 9, indices.shape).to(dtype).requires_grad_()
    acts = SparseActs.from_topk(values, indices.to(torch.int32), 9)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dense = torch.zeros(*batch, 9, dtype=dtype).scatter(-1, indices, values).to(wide)
    assert_canonical(acts)
    assert acts.shape == (*batch, 9) and acts.nnz == values.numel()
    assert_equal(acts.to_dense(), dense, [values])
    assert_same(acts.l0(), torch.full(batch, 4.0, dtype=wide))


def test_from_topk_keeps_zeros_off_and_drops_repeated_padding() -> None:
    values = torch.tensor([[5.0, 0, 0, 3], [0, 0, 7, 0], [0, -2, torch.nan, 0]])
    indices = torch.tensor([[2, 0, 0, 4], [0, 0, 0, 3], [1, 4, 0, 1]])
    acts = SparseActs.from_topk(values, indices, 5)
    assert acts.offsets.tolist() == [0, 3, 5, 8]
    assert acts.indices.tolist() == [0, 2, 4, 0, 3, 0, 1, 4]
    assert_same(acts.values, torch.tensor([0, 5.0, 3, 7, 0, torch.nan, 0, -2]))
    assert acts.gate.tolist() == [0, 1, 1, 1, 0, 1, 0, 1]


def test_from_topk_refuses_what_it_cannot_store() -> None:
    two, at = torch.ones(1, 2), torch.tensor([[3, 3]])
    with pytest.raises(ValueError, match="row 0 names latent 3 twice with non-zero values"):
        SparseActs.from_topk(two, at, 5)
    for bad in (5, -1):
        with pytest.raises(ValueError, match=rf"index {bad} is out of range \[0, d_sae=5\)"):
            SparseActs.from_topk(two, torch.tensor([[0, bad]]), 5)
    with pytest.raises(TypeError, match=r"values must be floating point, got torch.int64"):
        SparseActs.from_topk(at, at, 5)
    with pytest.raises(TypeError, match=r"indices must be integer, got torch.float32"):
        SparseActs.from_topk(two, two, 5)
    with pytest.raises(ValueError, match=r"same shape .* got \(1, 2\) and \(2,\)"):
        SparseActs.from_topk(two, at[0], 5)


# ---- edits


def test_union_adds_explicit_zeros_that_receive_gradients(case: Case) -> None:
    other = make((2, 3, 7), padding=5, seed=8)
    both = case.acts.union(other.acts)
    assert_canonical(both)
    stored = {int(k) for k in case.acts._keys()} | {int(k) for k in other.acts._keys()}
    assert both._keys().tolist() == sorted(stored)
    assert_equal(both.to_dense(), case.dense, case.leaves)
    assert_equal(both.l0(), case.gate.sum(-1), case.leaves)
    W_dec = torch.randint(-3, 4, (7, 4)).float()
    leaf = both.detach().requires_grad_()
    gsf.decode(leaf, W_dec).backward(torch.ones(2, 3, 4))
    assert_same(leaf.values.grad, W_dec.sum(1)[both.indices.long()])
    with pytest.raises(ValueError, match=r"union: other must have shape \(2, 3, 7\), got \(5, 7\)"):
        case.acts.union(make((5, 7)).acts)


VALUES: dict[str, Any] = {
    "int 0": lambda tokens: 0,
    "float 0": lambda tokens: 0.0,
    "number": lambda tokens: -2.5,
    "scalar": lambda tokens: torch.tensor(3.0),
    "per latent": lambda tokens: torch.tensor([4.0, 5.0, 6.0]),
    "per pair": lambda tokens: torch.arange(1.0, 3 * tokens + 1).view(tokens, 3),
    "with zeros": lambda tokens: torch.arange(3.0 * tokens).view(tokens, 3) % 2,
}
"""What `set` may be given, for three latents and a number of tokens."""
ROWS: list[Any] = [None, 0, slice(1, None), (1, slice(0, 2)), torch.ones(2, 3) > 0, []]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("rows", ROWS, ids=["all", "int", "slice", "tuple", "mask", "none"])
def test_set_writes_like_a_dense_assignment(case: Case, kind: str, rows: Any) -> None:
    latents = torch.tensor([6, 0, 3])
    tokens = torch.arange(6).view(2, 3)[... if rows is None else rows].reshape(-1)
    value = VALUES[kind](tokens.shape[0])
    if isinstance(value, Tensor):
        value.requires_grad_()
    where = (tokens[:, None], latents)
    filled = torch.as_tensor(value, dtype=torch.float32).expand(tokens.shape[0], 3)
    expected = case.dense.reshape(6, 7).index_put(where, filled).view(2, 3, 7)
    gate = case.gate.reshape(6, 7).index_put(where, (filled != 0).float()).view(2, 3, 7)
    before = case.acts.to_dense().detach()
    edited = case.acts.set(latents, value, rows)
    assert_canonical(edited)
    assert_equal(edited.to_dense(), expected, case.leaves + [value] * isinstance(value, Tensor))
    assert_equal(edited.l0(), gate.sum(-1), case.leaves)
    assert_same(case.acts.to_dense().detach(), before)


def test_set_to_the_number_zero_removes_the_entries(case: Case) -> None:
    mask = torch.tensor([True, False, False, True, False, False, False])
    for edited in (case.acts.set(mask, 0), case.acts.ablate(mask), case.acts.ablate([0, 3])):
        assert not bool(torch.isin(edited.indices, torch.tensor([0, 3])).any())
        assert_equal(edited.to_dense(), case.dense * ~mask, case.leaves)
    mean = torch.tensor([1.5, 2.5])
    assert_same(case.acts.ablate([0, 3], mean).to_dense()[1, 2, [0, 3]].detach(), mean)
    assert_equal(case.acts.set([], 5.0).to_dense(), case.dense, case.leaves)


@pytest.mark.parametrize("factor", [3.0, 0, torch.tensor(2.0), torch.tensor([2.0, -4, 0])])
def test_scale(case: Case, factor: Any) -> None:
    leaves = list(case.leaves)
    if isinstance(factor, Tensor):
        leaves.append(factor := factor.clone().requires_grad_())
    given = torch.as_tensor(factor, dtype=torch.float32).expand(3)
    factors = torch.ones(7).index_put((torch.tensor([6, 0, 3]),), given)
    scaled = case.acts.scale([6, 0, 3], factor)
    assert_equal(scaled.to_dense(), case.dense * factors, leaves)
    assert_equal(scaled.l0(), case.gate.sum(-1), case.leaves)


BAD_LATENTS: list[tuple[Any, type[Exception], str]] = [
    ([7], ValueError, r"latent 7 is out of range \[0, d_sae=7\)"),
    (-1, ValueError, r"latent -1 is out of range"),
    ([1, 2, 1], ValueError, r"latents must be distinct"),
    (torch.ones(6) > 0, ValueError, r"mask must have shape \[d_sae=7\], got \(6,\)"),
    (torch.tensor([1.0]), TypeError, r"latents must be integers or a mask, got torch.float32"),
]


@pytest.mark.parametrize(("latents", "kind", "text"), BAD_LATENTS)
def test_edits_refuse_bad_latents(
    case: Case, latents: Any, kind: type[Exception], text: str
) -> None:
    for edit in ("set", "ablate", "scale"):
        with pytest.raises(kind, match=("set" if edit == "ablate" else edit) + ": " + text):
            getattr(case.acts, edit)(latents, 2.0)


@pytest.mark.parametrize("rows", [[1, 1], torch.tensor([0, -2])])
def test_set_refuses_a_token_twice(rows: Any) -> None:
    with pytest.raises(ValueError, match="set: rows select token [01] more than once"):
        make((2, 7)).acts.set([0], 1.0, rows)


# ---- autograd state, devices, dtypes


def test_detach_and_requires_grad(case: Case) -> None:
    loose = case.acts.detach()
    assert not loose.values.requires_grad and not loose.gate.requires_grad
    assert loose.values.data_ptr() == case.acts.values.data_ptr()
    assert loose.requires_grad_() is loose and loose.values.is_leaf and loose.values.requires_grad
    assert not loose.requires_grad_(False).values.requires_grad
    with pytest.raises(RuntimeError, match="leaf"):
        make((5, 7)).acts.scale([1], 2.0).requires_grad_(False)


def test_to_casts_the_values_and_moves_everything(case: Case) -> None:
    acts = case.acts
    acts.needed, acts.threshold = torch.tensor(5), torch.tensor(0.5)
    acts.by_feature()
    for moved in (
        acts.to(torch.float64),
        acts.to("cpu", torch.float64),
        acts.to(dtype=torch.float64),
    ):
        assert (moved.dtype, moved.shape, moved.padded) == (torch.float64, acts.shape, acts.padded)
        assert_equal(moved.to_dense(), case.dense.double(), case.leaves)
        assert moved.gate is acts.gate and moved.permutation is acts.permutation
    meta = acts.to("meta")
    assert meta.device.type == "meta"
    assert all(getattr(meta, name).device.type == "meta" for name in (*FIELDS, *OPTIONAL))


# ---- pytrees and copies


def full(case: Case) -> SparseActs:
    acts = case.acts.detach()
    acts.needed, acts.threshold = torch.tensor(5), torch.tensor(0.5)
    acts.by_feature()
    return acts


def assert_fields_same(ours: SparseActs, expected: SparseActs) -> None:
    assert (ours.shape, ours.padded) == (expected.shape, expected.padded)
    for name in (*FIELDS, *OPTIONAL):
        assert_same(getattr(ours, name), getattr(expected, name), name)


def test_pytree_round_trip(case: Case) -> None:
    for acts in (case.acts.detach(), full(case)):
        leaves, spec = pytree.tree_flatten({"a": [acts, 3]})
        assert_fields_same(pytree.tree_unflatten(leaves, spec)["a"][0], acts)
        doubled = pytree.tree_map_only(Tensor, lambda t: 2 * t, acts)
        assert_same(doubled.values, 2 * acts.values)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(acts)[0]]
        present = [f".{name}" for name in (*FIELDS, *OPTIONAL) if getattr(acts, name) is not None]
        assert paths == present
    assert pytree.tree_map(lambda t: 0, acts).values == 0  # leaves need not be tensors
    spec = pytree.tree_structure(acts)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize("shape", [(7,), (0, 7), (5, 7), (4, 0, 7), (2, 3, 7), (3, 0)])
def test_the_number_of_tokens_is_no_part_of_the_structure(shape: tuple[int, ...]) -> None:
    acts = make(shape).acts
    leaves, spec = pytree.tree_flatten(acts)
    assert pytree.tree_unflatten(leaves, spec).shape == shape
    if len(shape) > 1 and 0 not in shape[1:-1]:
        other = make((9, *shape[1:])).acts
        assert pytree.tree_structure(other) == spec
        leaves = pytree.tree_leaves(other)
        assert pytree.tree_unflatten(leaves, spec).shape == (9, *shape[1:])


def test_copies_and_files(case: Case) -> None:
    for acts in (case.acts.detach(), full(case)):
        buffer = io.BytesIO()
        torch.save(acts, buffer)
        buffer.seek(0)
        copied = copy.deepcopy(acts)
        assert copied.values.data_ptr() != acts.values.data_ptr()
        assert copy.copy(acts).values is acts.values
        read = torch.load(buffer, weights_only=False)
        for other in (copied, pickle.loads(pickle.dumps(acts)), read):
            assert_fields_same(other, acts)


def test_shapes_that_do_not_fit_are_named() -> None:
    acts = make((5, 7)).acts
    wrong = r"must be a number or broadcast to \({}\), got \({}\)"
    with pytest.raises(ValueError, match="^scale: factor " + wrong.format("2,", "3,")):
        acts.scale([1, 2], torch.ones(3))
    with pytest.raises(ValueError, match="^set: value " + wrong.format("5, 2", "5,")):
        acts.set([1, 2], torch.ones(5))
    with pytest.raises(ValueError, match="^set: value " + wrong.format("5, 2", "1, 5, 2")):
        acts.set([1, 2], torch.ones(1, 5, 2))
    for start, end, text in (
        (5, 3, r"start must be in \[0, end=3\], got 5"),
        (0, 8, r"end must be in \[0, d_sae=7\], got 8"),
        (-1, 3, r"start must be in \[0, end=3\], got -1"),
    ):
        with pytest.raises(ValueError, match=f"^latent_range: {text}"):
            acts.latent_range(start, end)
    assert acts.latent_range(3, 3).shape == (5, 0) and acts.latent_range(0, 7).nnz == acts.nnz
