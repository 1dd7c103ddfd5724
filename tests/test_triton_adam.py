"""What only the Triton optimizer has: slabs of long rows, the composed step, tables of powers."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_all_same, assert_same
from samples import adam_state, fused_sparse_step_args, problem
from test_adam_step import run
from test_fused_sparse_step import copied, leaves

from gemmascope_fast import ops, reference, triton_launchers

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import adam_matrix, adam_step, latent_backward, launching
from gemmascope_fast.kernels import fused_sparse_step as fused

if not launching.INTERPRETED or ops.BACKEND != "triton":
    pytest.skip("runs in the interpreter only", allow_module_level=True)

SEGMENT = launching.choose("latent_backward", torch.device("cpu"), d=32, bytes=4)["SEGMENT"]
SLAB = launching.choose("adam_slabs", torch.device("cpu"), d=65536)["BLOCK"]
MOMENTUM = [0.01, 0.8, 0.9, 1e-8]


def step(*args) -> None:
    torch.ops.gemmascope_fast.adam_step_.default(*args)


@pytest.mark.parametrize(("dtype", "moments"), [(torch.float32, "fp32"), (torch.bfloat16, "8bit")])
def test_rows_in_slabs_have_the_bits_of_the_reference(monkeypatch, dtype, moments):
    monkeypatch.setattr(adam_step, "LARGEST_ROW", SLAB)
    weight = torch.randn(5, SLAB + 131).to(dtype)
    rule = {"rates": MOMENTUM, "tail": 2, "dtype": torch.float32, "seed": 3}
    ours = run(step, weight, 4, moments, **rule)
    assert_all_same(ours, run(reference.adam_step_, weight, 4, moments, **rule))
    assert not torch.equal(ours[0], weight)


def test_rows_in_slabs_lose_their_parallel_part_and_keep_their_norm(monkeypatch):
    monkeypatch.setattr(adam_step, "LARGEST_ROW", SLAB)
    weight = torch.nn.functional.normalize(torch.randn(3, 2 * SLAB + 5))
    flags = {"remove_parallel": True, "unit_norm": True}
    ours = run(step, weight, 3, **flags)[0]
    wanted = run(reference.adam_step_, weight.double(), 3, **flags, dtype=torch.float64)[0]
    assert (ours - wanted).abs().max() < 1e-6
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(3), rtol=4e-7, atol=0)
    zero = torch.zeros(1, SLAB + 3)
    gradient = torch.zeros_like(zero)
    gradient[0, -1] = 1.0
    step(zero, adam_state(zero), gradient, [0.5, 0.0, 0.9, 1e-8], [1, 0, 1, 1, 0])
    assert zero[0, -1] == -1 and not zero[0, :-1].any()


def test_one_element_of_a_long_row_touches_all_of_it(monkeypatch):
    monkeypatch.setattr(adam_step, "LARGEST_ROW", SLAB)
    weight = torch.zeros(2, SLAB + 7)
    state = adam_state(weight)
    state[1].fill_(1.0)
    gradient = torch.zeros_like(weight)
    gradient[1, 3] = float("nan")
    step(weight, state, gradient, [0.1, 0.0, 0.5, 1e-8], [4, 0, 0, 0, 0])
    assert state[3].tolist() == [0, 4] and bool((state[1][0] == 1).all())
    assert bool((state[1][1, SLAB:] == 0.5**4).all()), "v of every slab decays"


@pytest.mark.parametrize("gap", [1, 4095, 4096, 4097, 123_457, 2**25 + 3])
def test_moments_decay_over_any_gap(gap):
    weight, beta = torch.zeros(1, 3), 1 - 2.0**-20
    results = []
    for op in (step, reference.adam_step_):
        state = adam_state(weight)
        state[1].fill_(2.0)
        state[3].fill_(7)
        rates = [0.1, 0.0, beta, 1e-8]
        op(weight.clone(), state, torch.ones(1, 3), rates, [7 + gap, 0, 0, 0, 0])
        results.append(state)
    assert_all_same(*results)


def exact_args(sets: int = 1, ends=None) -> list:
    """Arguments of the fused step whose sums are exact; latents 0 and 3 fire everywhere."""
    p = problem(n=SEGMENT + 3, d_sae=7, integer=True)
    theta = p.threshold.clone()
    theta[[0, 3]] = -1000.0
    args = fused_sparse_step_args(p.with_(threshold=theta), 0.5, "8bit", 3, sets=sets)
    if ends is not None:
        args[5] = args[5].expand(len(ends), -1, -1)
        args[6] = list(ends)
    for i in (5, 11, 12):
        args[i] = torch.randint(-2, 3, args[i].shape).float()
    args[20][2:4] = [0, 0]  # sums of the update are not exact
    return args


@pytest.mark.parametrize(("sets", "ends"), [(1, None), (2, (2, 2, 7))])
def test_rows_too_long_for_registers_are_composed(monkeypatch, sets, ends):
    args = exact_args(sets, ends)
    assert args[13].diff().max() > SEGMENT, "a latent has a later piece"
    both = [copied(args), copied(args)]
    op = torch.ops.gemmascope_fast.fused_sparse_step.default
    one_pass = leaves(both[0], op(*both[0]))
    monkeypatch.setattr(latent_backward, "LARGEST_ROW", 18)
    monkeypatch.setattr(adam_step, "LARGEST_ROW", 18)
    monkeypatch.setattr(fused, "in_registers", None)
    assert_all_same(one_pass, leaves(both[1], op(*both[1])))
    assert not torch.equal(both[1][1], args[1])


def test_a_wrong_feature_view_touches_no_memory():
    args = exact_args()
    args[13] = args[13] * 3 - 40
    args[14] = args[14] * 2**33 - 5
    results = torch.ops.gemmascope_fast.fused_sparse_step.default(*args)
    assert [t.shape for t in results] == [(7,), (7,), (19,)]


def test_the_same_arguments_give_the_same_bits():
    args = fused_sparse_step_args(problem(n=SEGMENT + 3, d_sae=9))
    both = [copied(args), copied(args)]
    op = torch.ops.gemmascope_fast.fused_sparse_step.default
    assert_all_same(*(leaves(a, op(*a)) for a in both))


def test_powers_are_made_once_and_rounded_once():
    table = adam_matrix.powers(0.999, torch.device("cpu"))
    assert table.data_ptr() == adam_matrix.powers(0.999, torch.device("cpu")).data_ptr()
    assert table[0, 4095] == 0.999**4095 and table[1, 2] == 0.999**8192
    assert table[:, 0].tolist() == [1.0, 1.0, 1.0]


def test_ops_that_write_are_not_repeated_to_tune_them(monkeypatch):
    weight, state = torch.zeros(1, 3), adam_state(torch.zeros(1, 3))
    monkeypatch.setattr(triton_launchers, "TUNE", True)
    rates = [0.1, 0.0, 0.9, 1e-8]
    step(weight, state, torch.ones(1, 3), rates, [1, 0, 0, 0, 0])
    assert_same(state[1], torch.full((1, 3), 1 - 0.9))
    assert [triton_launchers._writes(n) for n in ("decode_", "fused_sparse_step", "decode")] == [
        *(True, True, False)
    ]
