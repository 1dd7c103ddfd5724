"""decode_ and the memory it writes: what it refuses, and what lies next to it."""

from __future__ import annotations

import pytest
import torch
from conftest import native_absent
from oracle import assert_all_same, assert_same
from samples import Problem, jumprelu_entries, problem
from test_decode import acts_of, per_entry_sum
from torch import Tensor

import gemmascope_fast as gsf

OPS = ("decode_",)


def overlapping_targets() -> dict[str, tuple[Tensor, Problem, list[Tensor]]]:
    """recon, problem and entries by what recon's memory shares."""
    p = problem(integer=True)
    entries = jumprelu_entries(p)[:3]
    decoder = torch.zeros(37 + 13, 19)
    pool = torch.zeros(entries[2].shape[0] + 13 * 19)
    values = pool[: entries[2].shape[0]].copy_(entries[2])
    offsets = torch.zeros(13 * 19 // 2 + 20, dtype=torch.int64)
    offsets[:14] = entries[0]
    return {
        "W_dec": (decoder[30:43], p.with_(W_dec=decoder[:37].copy_(p.W_dec)), entries),
        "values": (pool[-13 * 19 - 1 : -1].view(13, 19), p, [*entries[:2], values]),
        "offsets": (
            offsets.view(torch.float32)[: 13 * 19].view(13, 19),
            p,
            [offsets[:14], *entries[1:]],
        ),
    }


@pytest.mark.parametrize("name", ["W_dec", "values", "offsets"])
def test_in_place_refuses_a_target_that_shares_memory(name):
    if reason := native_absent(OPS):
        pytest.skip(reason)
    recon, p, entries = overlapping_targets()[name]
    before = [t.clone() for t in (p.W_dec, *entries)]
    with pytest.raises(RuntimeError, match=f"decode_: recon shares memory with {name}.*clone"):
        torch.ops.gemmascope_fast.decode_(recon, *entries, p.W_dec)
    assert_all_same((p.W_dec, *entries), before)


def test_in_place_takes_neighbours_in_one_allocation(backend):
    p = problem(integer=True)
    entries = jumprelu_entries(p)[:3]
    memory = torch.ones(13 + 37 + 13, 19)
    W_dec = memory[13:50].copy_(p.W_dec)
    for recon in (memory[:13], memory[50:]):
        backend.op("decode_")(recon, *entries, W_dec)
        assert_same(recon, per_entry_sum(p, entries, None).float() + 1)
    assert_same(W_dec, p.W_dec)


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (18, 1), (1, 12), (7, 3)])
def test_in_place_refuses_a_target_that_overlaps_itself(strides):
    if reason := native_absent(OPS):
        pytest.skip(reason)
    p = problem(integer=True)
    entries = jumprelu_entries(p)[:3]
    recon = torch.zeros(500).as_strided((13, 19), strides)
    with pytest.raises(RuntimeError, match="decode_: recon must not overlap itself, .*clone"):
        torch.ops.gemmascope_fast.decode_(recon, *entries, p.W_dec)
    assert not recon.any()


def test_in_place_refuses_a_lazily_negated_target(backend):
    p = problem(integer=True)
    acts = acts_of(jumprelu_entries(p), (13, 37))
    recon = torch.complex(torch.zeros(13, 19), torch.zeros(13, 19)).conj().imag
    assert recon.is_neg()
    with pytest.raises(ValueError, match="decode_: recon must not be a negated view.*resolve_neg"):
        gsf.decode_(recon, acts, p.W_dec)
