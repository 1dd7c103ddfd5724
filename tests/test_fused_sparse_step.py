"""fused_sparse_step: the same bits as sae_backward followed by adam_step_ on both matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from oracle import assert_all_same, assert_same
from samples import adam_state, fused_sparse_step_args, problem, sae_backward_args
from torch import Tensor

OPS = ("fused_sparse_step", "adam_step_", "sae_backward")
W_ENC, W_DEC = 1, 4


def copied(args: list[Any]) -> list[Any]:
    return pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args)


def leaves(args: list[Any], results: tuple[Tensor, ...]) -> list[Tensor]:
    """What a step changes and returns."""
    return [*results, args[W_ENC], args[W_DEC], *args[15], *args[16]]


def fused(backend: Any, args: list[Any]) -> list[Tensor]:
    args = copied(args)
    return leaves(args, backend.op("fused_sparse_step")(*args))


def unfused(backend: Any, args: list[Any]) -> list[Tensor]:
    args = copied(args)
    _, d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec = backend.op("sae_backward")(
        *args[:15], False
    )
    step = backend.op("adam_step_")
    step(args[W_ENC].t(), args[15], d_W_enc.t(), args[17], args[19])
    step(args[W_DEC], args[16], d_W_dec, args[18], args[20])
    return leaves(args, (d_b_enc, d_threshold, d_b_dec))


INTERPRETED = [(16, 0, "fp32"), (23, 3, "8bit"), (257, 0, "8bit")]


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize(("beta1", "tail"), [(0.0, 0), (0.5, 3), (0.5, 2**62)])
@pytest.mark.parametrize("d", [16, 23, 257])
def test_equals_backward_then_step_bit_for_bit(backend, moments, beta1, tail, d):
    latents = 301
    if backend.interpreted:
        latents = 15
        if (d, tail, moments) not in INTERPRETED:
            pytest.skip("interpreted: each width once, with options of its own")
    p = problem(n=40, d_in=d, d_sae=latents, d_out=d + 3)
    p = p.with_(threshold=p.threshold + 1.5)
    args = fused_sparse_step_args(p, beta1, moments, tail)
    touched = torch.zeros(latents, dtype=torch.bool)
    touched[args[8][args[9] > 0].long()] = True  # window entries alone change no row
    assert touched.any() and not touched.all()
    for step in (1, 2, 6):
        args[19][0] = args[20][0] = step
        results = fused(backend, args)
        assert_all_same(results, unfused(backend, args))
        args[W_ENC], args[W_DEC], args[15], args[16] = (
            *results[3:5],
            results[5:9],
            results[9:13],
        )
        args[5] = args[5].flip(1)
    still = ~touched
    assert_same(results[4][still], p.W_dec[still])
    assert (args[16][3] > 0).tolist() == touched.tolist()


def test_groups_and_sets(backend):
    p = problem(n=9)
    args = fused_sparse_step_args(p, sets=3, group_ends=(0, 9, 20, 37))
    assert_all_same(fused(backend, args), unfused(backend, args))


def test_without_window_and_extras(backend):
    args = fused_sparse_step_args(problem())
    args[2], args[3], args[11], args[12] = None, 0.0, None, None
    results = fused(backend, args)
    assert_all_same(results, unfused(backend, args))
    assert results[1].shape == (0,)


def test_bf16_weights_are_updated_from_gradients_in_float32(backend):
    p = problem(n=40, w_dtype=torch.bfloat16)
    args = fused_sparse_step_args(p)
    results = fused(backend, args)
    wide = copied(args)
    wide[W_ENC], wide[W_DEC] = wide[W_ENC].float(), wide[W_DEC].float()
    expected = fused(backend, wide)
    assert results[3].dtype == results[4].dtype == torch.bfloat16
    for mine, other in zip(results[3:5], expected[3:5], strict=True):
        assert ((mine.float() - other).abs() <= other.abs() * 2**-7 + 1e-30).all()
    assert_all_same(results[5:], expected[5:])


def test_window_entries_alone_touch_no_row(backend):
    """Their value and gate are 0: only the threshold's gradient sees them."""
    p = problem(n=3)
    p = p.with_(threshold=(p.x @ p.W_enc + p.b_enc).amax(0) + 0.05)
    args = fused_sparse_step_args(p, bandwidth=0.4)
    assert args[10].numel() > 10 and not args[10].any()
    before = copied(args)
    results = fused(backend, args)
    assert_all_same(results[3:], leaves(before, ()))
    assert results[1].bool().sum() > 10


@pytest.mark.parametrize("n", [0, 2])
def test_without_entries(backend, n):
    p = problem(n=n, d_sae=7)
    args = fused_sparse_step_args(p.with_(threshold=torch.full((7,), 1e9)))
    before = copied(args)
    results = fused(backend, args)
    assert_all_same(results[3:], leaves(before, ()))
    assert not results[0].any() and not results[1].any()
    torch.testing.assert_close(results[2], args[5].sum((0, 1)))


BAD = [
    (W_ENC, torch.ones(23, 37), "W_enc must have one contiguous row of memory per latent"),
    (W_DEC, torch.ones(19, 37).t(), "W_dec must have one contiguous row of memory per latent"),
    (W_DEC, torch.ones(37, 19).half(), "W_dec must be float32 or bfloat16"),
    (15, adam_state(torch.ones(19, 37)), r"exp_avg_sq must have shape \[37, 23\]"),
    (17, [0.1], "rates must be"),
    (20, [0, 0, 0, 0, 0], "step must be >= 1, got 0"),
    (14, torch.zeros(3, dtype=torch.int64), "permutation must have shape"),
]


@pytest.mark.parametrize(("at", "value", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_change_nothing(backend, at, value, message):
    if backend.name == "reference":
        pytest.skip("the reference does not check")
    args = fused_sparse_step_args(problem())
    args[at] = value
    before = copied(args)
    with pytest.raises(RuntimeError, match=f"^fused_sparse_step: {message}"):
        backend.op("fused_sparse_step")(*args)
    assert_all_same(leaves(args, ()), leaves(before, ()))


def test_arguments_are_those_of_sae_backward_and_both_updates():
    args = fused_sparse_step_args(problem())
    assert len(args) == len(sae_backward_args(problem())) - 1 + 6
