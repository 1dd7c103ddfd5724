"""What only the Triton backward promises: pieces of long latents, long rows, bad indices, bits."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_all_same, assert_same
from samples import (
    decode_backward_args,
    encode_backward_args,
    problem,
    sae_backward_args,
)
from test_sae_backward import D_RECON, NAMES, OFFSETS, X, dense

from gemmascope_fast import ops

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import (
    latent_backward,
    launching,
    segments,
    token_order,
)
from gemmascope_fast.kernels import latent_order as ordering
from gemmascope_fast.kernels import sae_backward as composition

if not launching.INTERPRETED or ops.BACKEND != "triton":
    pytest.skip("runs in the interpreter only", allow_module_level=True)

SEGMENT = launching.choose("latent_backward", torch.device("cpu"), d=32, bytes=4)["SEGMENT"]


def call(name: str, args) -> tuple[torch.Tensor, ...]:
    return getattr(torch.ops.gemmascope_fast, name).default(*args)


def integer_args(n: int = 5, d_sae: int = 7, sets: int = 1, ends=None):
    """sae_backward's arguments with every sum exact; latents 0 and 3 fire everywhere."""
    p = problem(n=n, d_sae=d_sae, integer=True)
    theta = p.threshold.clone()
    theta[[0, 3]] = -1000.0
    theta[5] = 1000.0
    args = sae_backward_args(p.with_(threshold=theta), 4.0, sets, ends)
    for i in (11, 12, D_RECON):
        args[i] = torch.randint(-2, 3, args[i].shape).float()
    return args


def exact(args) -> list[torch.Tensor]:
    return [t.float() for t in dense(args, torch.float64)]


@pytest.mark.parametrize("n", [SEGMENT, SEGMENT + 1, 3 * SEGMENT - 1, 3 * SEGMENT])
def test_latents_that_always_fire_are_summed_in_pieces(n):
    args = integer_args(n)
    counts = args[13].diff()
    assert counts.max() == n and counts.min() == 0
    assert_all_same(call("sae_backward", args), exact(args), NAMES)


def test_pieces_of_groups_and_sets():
    args = integer_args(2 * SEGMENT - 3, sets=2, ends=(0, 3, 3, 7))
    assert_all_same(call("sae_backward", args), exact(args), NAMES)


def order_of(args) -> ordering.LatentOrder:
    offsets, indices, values = args[OFFSETS : OFFSETS + 3]
    return ordering.latent_order(offsets, indices, *args[13:15], (values, *args[10:13]))


def test_latent_order_names_the_token_of_every_entry():
    args = integer_args(2 * SEGMENT)
    order, offsets, permutation = order_of(args), args[OFFSETS], args[14]
    rows = torch.repeat_interleave(torch.arange(2 * SEGMENT), offsets.diff())
    assert_same(order.tokens, rows[permutation].int())
    for found, source in zip(order.sources, args[9:13], strict=True):
        assert_same(found, source[permutation])
    wanted = torch.empty_like(args[11]).copy_(args[11] * args[10])
    assert_same(token_order.token_order(order), wanted)


@pytest.mark.parametrize("first", [0, 2])
def test_later_pieces_lie_where_the_definition_says(first):
    args = integer_args(3 * SEGMENT + 5)
    order, starts = order_of(args), args[13].tolist()
    owners = segments.later_pieces(order, first, 7, SEGMENT).tolist()
    wanted = [-1] * len(owners)
    for latent in range(first, 7):
        for start in range(starts[latent] + SEGMENT, starts[latent + 1], SEGMENT):
            assert wanted[start // SEGMENT] == -1
            wanted[start // SEGMENT] = latent
    assert owners == wanted and len(set(owners)) > 3


@pytest.mark.parametrize(("sets", "ends"), [(1, None), (2, (2, 2, 7))])
def test_rows_too_long_for_registers_take_three_passes(monkeypatch, sets, ends):
    args = integer_args(SEGMENT + 3, sets=sets, ends=ends)
    one_pass = call("sae_backward", args)
    monkeypatch.setattr(latent_backward, "LARGEST_ROW", 18)
    monkeypatch.setattr(composition, "_fused", None)
    assert not latent_backward.fits(23, 18)
    assert_all_same(call("sae_backward", args), exact(args), NAMES)
    assert_all_same(one_pass, exact(args), NAMES)


@pytest.mark.parametrize("name", ["decode_backward", "encode_backward"])
def test_indices_out_of_range_contribute_nothing(name):
    p = problem(integer=True)
    args = decode_backward_args(p) if name == "decode_backward" else encode_backward_args(p, 4.0)
    first = 1 if name == "decode_backward" else 6
    for i in (0,) if name == "decode_backward" else (0, 1):
        args[i] = torch.randint(-3, 4, args[i].shape).float()
    offsets, indices = args[first : first + 2]
    bad = torch.randperm(indices.shape[0])[:9]
    keep = torch.ones(indices.shape[0], dtype=torch.bool)
    keep[bad] = False
    rows = torch.repeat_interleave(torch.arange(13), offsets.diff())
    counts = torch.bincount(rows[keep], minlength=13)
    view = 5 if name == "decode_backward" else 10
    args[view : view + 2] = [None, None]
    without = list(args)
    without[first] = torch.cat([offsets[:1], counts.cumsum(0)])
    for i, t in enumerate(args):
        if i != first and isinstance(t, torch.Tensor) and t.shape == indices.shape:
            without[i] = t[keep]
    wrong = torch.tensor([37, -1, 2**31 - 1, -(2**31), 38, 1000, -37, 37, -5])
    args[first + 1] = indices.clone().index_put_((bad,), wrong.int())
    got, wanted = call(name, args), call(name, without)
    assert_all_same(got[1:], wanted[1:])
    if name == "decode_backward":
        assert_same(got[0][keep], wanted[0])
        assert not got[0][bad].any()
    else:
        assert_same(got[0], wanted[0])


def test_a_wrong_feature_view_touches_no_memory():
    # Segments and positions outside of the entries: any result, but no access outside.
    args = integer_args()
    args[13] = args[13] * 3 - 40
    args[14] = args[14] * 2**33 - 5
    results = call("sae_backward", args)
    assert [t.shape for t in results[:2]] == [args[X].shape, args[1].shape]


def test_the_same_arguments_give_the_same_bits():
    args = sae_backward_args(problem(n=2 * SEGMENT + 1, d_sae=9), sets=1)
    assert_all_same(call("sae_backward", args), call("sae_backward", args), NAMES)


def test_a_latent_does_not_depend_on_its_neighbours():
    # The same entries of latent 4 among others, or alone: the same bits.
    p = problem(n=2 * SEGMENT + 1, d_sae=9)
    alone = p.threshold.clone()
    alone[:4], alone[5:] = 1000.0, 1000.0
    args = sae_backward_args(p, 0.4)
    few = sae_backward_args(p.with_(threshold=alone), 0.4)
    mine = args[8] == 4
    few[11:13] = [args[11][mine], args[12][mine]]
    many, one = call("sae_backward", args), call("sae_backward", few)
    for k in (1, 2, 3, 4):
        column = (slice(None), 4) if k == 1 else (4,)
        assert_same(many[k][column], one[k][column], NAMES[k])
