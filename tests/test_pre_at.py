"""pre_at: ungated pre-activations of given pairs, and their gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import accumulation_bound, assert_close_to_truth, assert_same, exact_pre
from samples import LAYOUTS, MIXED, problem, weight_layouts

import gemmascope_fast as gsf

OPS = ("pre_at", "encode_backward")


def pairs(n: int, d_sae: int, count: int):
    return torch.randint(0, n, (count,)), torch.randint(0, d_sae, (count,))


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_matches_the_definition(backend, dtypes):
    p = problem(21, 53, 301, x_dtype=dtypes[0], w_dtype=dtypes[1])
    rows, latents = pairs(21, 301, 500)
    pre = backend.op("pre_at")(*p.encoder, rows, latents)
    error = (pre.double() - exact_pre(*p.encoder)[rows, latents]).abs()
    assert pre.dtype == torch.float32
    assert (error <= accumulation_bound(*p.encoder)[rows, latents]).all()


def test_has_the_bits_of_the_encoder(backend):
    p = problem(40, 83, 301)
    if backend.gpu_terms:
        pytest.skip("pre_at and the encoder sum in different orders, see kernels/pre_at.py")
    if not backend.native:
        pytest.skip("the reference's matrix product has no fixed order of summation")
    encode = torch.ops.gemmascope_fast.jumprelu_encode.default
    offsets, indices, values, *_ = encode(*p.encoder, p.threshold, 0.0, None, False)
    rows = torch.repeat_interleave(torch.arange(40), offsets.diff())
    assert_same(backend.op("pre_at")(*p.encoder, rows, indices.long()), values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", MIXED[::4], ids=str)
def test_any_layout(backend, layout, dtypes):
    for d_in in (37, 48):
        p = problem(40, d_in, 41, integer=True, x_dtype=dtypes[0], w_dtype=dtypes[1])
        rows, latents = pairs(40, 41, 200)
        moved = weight_layouts(p, layout)
        wanted = exact_pre(*p.encoder).float()[rows, latents]
        assert_same(backend.op("pre_at")(*moved.encoder, rows, latents), wanted)
        spread = torch.stack([rows, rows - 99], 1)[:, 0], torch.stack([latents] * 2, 1)[:, 1]
        assert_same(backend.op("pre_at")(*moved.encoder, *spread), wanted)


@pytest.mark.parametrize("d_in", [0, 1, 15, 16, 17, 33, 640, 1152, 5376])
def test_every_width(backend, d_in):
    p = problem(5, d_in, 7, integer=True)
    rows, latents = pairs(5, 7, 30)
    pre = backend.op("pre_at")(*p.encoder, rows, latents)
    assert_same(pre, exact_pre(*p.encoder).float()[rows, latents])


def test_no_pairs(backend):
    none = torch.zeros(0, dtype=torch.int64)
    for n, d_sae in ((3, 4), (0, 4), (3, 0)):
        p = problem(n, 5, d_sae)
        pre = backend.op("pre_at")(*p.encoder, none, none)
        assert pre.shape == (0,) and pre.dtype == torch.float32


def test_special_values(backend):
    p = problem(integer=True)
    x = p.x.clone()
    x[2], x[3, 0], x[4] = float("nan"), float("inf"), -0.0
    rows, latents = torch.cartesian_prod(torch.arange(13), torch.arange(37)).t()
    pre = backend.op("pre_at")(x, p.W_enc, p.b_enc, rows, latents)
    assert_same(pre.view(13, 37), (x @ p.W_enc + p.b_enc))


@pytest.mark.parametrize("batch", [(13,), (1, 13)])
def test_rows_count_flattened_tokens_and_any_integer_dtype(backend, batch):
    p = problem(integer=True)
    rows, latents = pairs(13, 37, 50)
    x = p.x.reshape(*batch, 23)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        pre = gsf.pre_at(x, p.W_enc, p.b_enc, rows.to(dtype), latents.to(dtype))
        assert_same(pre, exact_pre(*p.encoder).float()[rows, latents])


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
def test_gradients(backend, wanted):
    # Pairs in any order, some of them several times.
    rows, latents = pairs(13, 37, 400)
    weight = torch.randn(400)
    grads = []
    for wide, dense in ((torch.float32, False), (torch.float32, True), (torch.float64, True)):
        inputs = [t.detach().to(wide) for t in problem().encoder]
        for i in wanted:
            inputs[i].requires_grad_()
        pre = (
            (inputs[0] @ inputs[1] + inputs[2])[rows, latents]
            if dense
            else gsf.pre_at(*inputs, rows, latents)
        )
        leaves = [inputs[i] for i in wanted]
        grads.append(torch.autograd.grad((pre * weight.to(wide)).sum(), leaves))
    for mine, theirs, truth in zip(*grads, strict=True):
        assert_close_to_truth(mine, theirs, truth, torch.float32, terms=40)


def test_gradcheck_and_second_derivative(backend):
    p = problem(n=3, d_in=4, d_sae=6).double().leaves()
    rows, latents = torch.tensor([2, 0, 2, 2]), torch.tensor([5, 1, 5, 0])
    assert torch.autograd.gradcheck(lambda *a: gsf.pre_at(*a, rows, latents), p.encoder)
    pre = gsf.pre_at(*p.encoder, rows, latents)
    (d_x,) = torch.autograd.grad(pre.sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="encode_backward is not differentiable"):
        d_x.sum().backward()
