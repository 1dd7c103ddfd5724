"""fused_sparse_step's CUDA kernels run on the CPU: the bits of the two ops apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_all_same, assert_same
from samples import fused_sparse_step_args, problem
from test_cuda_adam import adam_step, native
from test_cuda_adam import matrix as adam_matrix
from test_cuda_passes import LARGE, full, matrix, records, sae_backward, vector
from test_fused_sparse_step import W_DEC, W_ENC, copied, leaves
from torch import Tensor

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
pytest.importorskip("gemmascope_fast._C", reason="the native library is not built")

SEGMENT = 256


def fused(args: list[Any], shared: int = LARGE, seed: int = 0) -> list[Tensor]:
    """What the kernels make of the op's arguments; the last result of the op is left out."""
    args = copied(args)
    x, W_enc, threshold, bandwidth, W_dec, d_recon, group_ends, *entries = args[:15]
    offsets, indices, values, gate, d_values, d_gate, feature_offsets, permutation = entries
    record = records(offsets, feature_offsets, permutation, values, gate, d_values)
    d_b_enc = full(W_dec.shape[0])
    d_threshold = full(W_dec.shape[0] if bandwidth > 0 else 0)
    given = dict(
        feature_offsets=vector(feature_offsets),
        permutation=vector(permutation),
        indices=vector(indices),
        records=vector(record),
        threshold=vector(threshold),
        bandwidth=bandwidth,
        d_gate=vector(d_gate),
        d_b_enc=vector(d_b_enc),
        d_threshold=vector(d_threshold) if bandwidth > 0 else None,
        W_dec=matrix(W_dec),
        x=matrix(x),
    )
    updates = [
        (adam_matrix(w, state, rates[1]), rates, rule)
        for w, state, rates, rule in zip(
            (W_enc.t(), W_dec), args[15:17], args[17:19], args[19:21], strict=True
        )
    ]
    seen = d_recon[-1]
    testing.cuda_seed(seed)
    for group in reversed(range(len(group_ends))):
        if group < len(group_ends) - 1:
            seen = seen.float() + d_recon[group].float()
        given |= dict(g=matrix(seen), first=[0, *group_ends][group], last=group_ends[group])
        assert testing.cuda_fused_pass(given, *updates, shared) > 0
    testing.cuda_seed(0)
    return leaves(args, (d_b_enc, d_threshold))


def apart(args: list[Any]) -> list[Tensor]:
    """The kernels of sae_backward, with gradients in float32, and of adam_step_."""
    args = copied(args)
    wide = [*args[:15], False]
    wide[W_ENC], wide[W_DEC] = args[W_ENC].float(), args[W_DEC].float()
    _, d_W_enc, d_b_enc, d_threshold, d_W_dec = sae_backward(wide)
    adam_step(256)(args[W_ENC].t(), args[15], d_W_enc.t(), args[17], args[19])
    adam_step(64)(args[W_DEC], args[16], d_W_dec, args[18], args[20])
    return leaves(args, (d_b_enc, d_threshold))


def next_step(args: list[Any], results: list[Tensor]) -> None:
    """Go on from the results with other gradients."""
    args[W_ENC], args[W_DEC] = results[2:4]
    args[15], args[16] = results[4:8], results[8:12]
    args[5] = args[5].flip(1)
    args[19][0] += 2
    args[20][0] += 1


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize(("beta1", "tail"), [(0.0, 0), (0.5, 3), (0.5, 2**62)])
@pytest.mark.parametrize(
    ("d", "dtype"), [(16, torch.float32), (23, torch.bfloat16), (300, torch.bfloat16)]
)
def test_the_bits_of_backward_then_step(moments, beta1, tail, d, dtype):
    p = problem(n=20, d_in=d, d_sae=61, d_out=d + 3, x_dtype=dtype, w_dtype=dtype)
    p = p.with_(threshold=p.threshold + 1.5)
    args = fused_sparse_step_args(p, beta1, moments, tail)
    touched = torch.zeros(61, dtype=torch.bool)
    touched[args[8][args[9] > 0].long()] = True
    assert touched.any() and not touched.all()
    for _ in range(3):
        results = fused(args)
        assert_all_same(results, apart(args))
        next_step(args, results)
    assert_same(results[3][~touched], p.W_dec[~touched])
    assert (args[16][3] > 0).tolist() == touched.tolist()


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "sets", "ends"), [(9, 1, (7,)), (SEGMENT + 3, 1, (7,)), (30, 3, (2, 2, 7))]
)
def test_the_bits_of_the_cpu_op_where_sums_are_exact(moments, dtype, n, sets, ends):
    p = problem(n=n, d_in=40, d_out=24, d_sae=7, integer=True, x_dtype=dtype, w_dtype=dtype)
    theta = p.threshold.clone()
    theta[[0, 3]] = -1000.0  # they fire everywhere
    args = fused_sparse_step_args(p.with_(threshold=theta), 0.5, moments, 3, sets=sets)
    args[5] = args[5].expand(len(ends), -1, -1)
    args[6] = list(ends)
    for i in (5, 11, 12):
        args[i] = torch.randint(-2, 3, args[i].shape).to(args[i].dtype)
    args[20][2:4] = [0, 0]  # sums of the update are not exact
    theirs = copied(args)
    results = torch.ops.gemmascope_fast.fused_sparse_step.default(*theirs)
    assert_all_same(fused(args), leaves(theirs, results[:2]))
    assert not torch.equal(theirs[W_DEC], args[W_DEC])


@pytest.mark.parametrize("d", [2056, 4104, 5376, 5384, 8192])
@pytest.mark.parametrize("beta1", [0.5, 0.0])
def test_rows_of_several_chunks_per_thread(d, beta1):
    p = problem(4, d, 5, d, x_dtype=torch.bfloat16, w_dtype=torch.bfloat16)
    args = fused_sparse_step_args(p, beta1, "8bit", 3 if beta1 else 0)
    assert_all_same(fused(args), apart(args))


@pytest.mark.parametrize(("d_in", "d_out"), [(8, 700), (700, 8), (1, 1), (2, 3000)])
def test_rows_of_different_widths(d_in, d_out):
    args = fused_sparse_step_args(problem(5, d_in, 9, d_out), 0.5, "8bit", 3)
    assert_all_same(fused(args), apart(args))


@pytest.mark.parametrize("shared", [17000, 24000, LARGE])
def test_any_number_of_stages(shared):
    args = fused_sparse_step_args(problem(30, 40, 11, 24), 0.5, "8bit", 3)
    assert_all_same(fused(args, shared), fused(args))


def test_long_segments():
    p = problem(n=2 * SEGMENT + 9, d_in=20, d_sae=5, d_out=24)
    args = fused_sparse_step_args(
        p.with_(b_enc=torch.tensor([0.0, 50.0, 0.0, 0.0, 50.0])), 0.5, "8bit", 3
    )
    assert args[13].diff().max() > 2 * SEGMENT
    assert_all_same(fused(args), apart(args))


def test_the_order_of_threads_changes_no_bit():
    args = fused_sparse_step_args(problem(20, 300, 9, 280, w_dtype=torch.bfloat16), 0.5, "8bit", 3)
    for seed in range(1, 8):
        assert_all_same(fused(args, seed=seed), fused(args))


def test_without_window_and_extras():
    args = fused_sparse_step_args(problem())
    args[2], args[3], args[11], args[12] = None, 0.0, None, None
    assert_all_same(fused(args), apart(args))


def test_window_entries_alone_touch_no_row():
    """Their value and gate are 0: only the threshold's gradient sees them."""
    p = problem(n=3)
    p = p.with_(threshold=(p.x @ p.W_enc + p.b_enc).amax(0) + 0.05)
    args = fused_sparse_step_args(p, bandwidth=0.4)
    assert args[10].numel() > 10 and not args[10].any()
    results = fused(args)
    assert_all_same(results[2:], leaves(args, ()))
    assert results[1].bool().sum() > 10


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("beta1", [0.0, 0.8])
def test_without_entries_live_rows_move(n, beta1):
    p = problem(n=n, d_sae=7)
    args = fused_sparse_step_args(p.with_(threshold=torch.full((7,), 1e9)), beta1, "fp32", 5)
    args[19][0] = args[20][0] = 4
    for state in args[15:17]:
        state[3][2:4] = torch.tensor([1, 3])
        state[1].fill_(2.0)
        if beta1:
            state[0].fill_(0.5)
    assert_all_same(fused(args), apart(args))
    theirs = copied(args)
    for at, w in ((15, theirs[W_ENC].t()), (16, theirs[W_DEC])):
        native(w, theirs[at], torch.zeros_like(w), theirs[at + 2], [*theirs[at + 4][:2], 0, 0, 1])
    mine = copied(args)
    for at in (19, 20):
        mine[at] = [*mine[at][:2], 0, 0, 1]
    assert_all_same(fused(mine)[2:], leaves(theirs, ()))
    moved = (theirs[W_DEC] != args[W_DEC]).any(1)
    assert moved.nonzero()[:, 0].tolist() == ([2, 3] if beta1 else [])


def test_a_wrong_view_touches_no_memory():
    args = fused_sparse_step_args(problem(), 0.5, "8bit", 3)
    args[13] = args[13] * 3 - 40
    args[14] = args[14] * 2**33 - 5
    fused(args)


def test_state_of_wide_strides():
    args = fused_sparse_step_args(problem(), 0.5, "fp32", 3)
    wide = copied(args)
    wide[16][1] = torch.zeros(37, 50)[:, 3:22]
    wide[16][0] = torch.zeros(37, 21)[:, 1:20]
    assert_all_same(fused(wide), fused(args))
