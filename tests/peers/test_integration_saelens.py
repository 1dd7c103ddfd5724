"""SAELens with the backend installed computes what SAELens computes: values, gradients, counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peer import D, F, N, batch, close
from saelens_modules import BANDWIDTH, INFERENCE, TRAINED, Largest, make, step_input
from torch import Tensor

from gemmascope_fast.integrations import saelens
from gemmascope_fast.integrations.lazy_acts import LazyActs


@pytest.fixture
def installed() -> Iterator[None]:
    with saelens.install():
        yield


def pair(given: Any, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """Two equal modules, the second one accelerated."""
    stock, ours = make(given, seed, **options), make(given, seed, **options)
    saelens.accelerate(ours)
    return stock, ours


def check_gradients(stock: Any, ours: Any, theirs: Tensor, mine: Tensor, *inputs: Tensor) -> None:
    """All gradients are SAELens', of parameters and of `inputs` (theirs first), None included."""
    for module, loss in ((stock, theirs), (ours, mine)):
        module.zero_grad()
        loss.backward()
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert q.grad.layout == torch.strided and q.grad.stride() == p.grad.stride()
            close(q.grad, p.grad, name)
    if inputs:
        close(inputs[1].grad, inputs[0].grad, "x")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dead", [None, "many", "few"])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_training_step(kind: str, dead: str | None, seed: int) -> None:
    stock, ours = pair(TRAINED[kind], seed)
    coo, normed = kind == "topk coo", kind == "layer norm"
    given = step_input(batch(seed), dead)
    theirs, mine = stock.training_forward_pass(given), ours.training_forward_pass(given)
    assert isinstance(mine.feature_acts, LazyActs)
    assert list(mine.losses) == list(theirs.losses) and set(mine.metrics) == set(theirs.metrics)
    for name, value in theirs.losses.items():
        assert normed or not value.any() or value.abs() > 1e-3
        close(mine.losses[name], value, name)
    close(mine.loss, theirs.loss, "loss")
    close(mine.sae_out, theirs.sae_out, "sae_out")
    close(mine.hidden_pre, theirs.hidden_pre, "hidden_pre")
    acts = theirs.feature_acts.to_dense()
    assert torch.equal(mine.feature_acts != 0, acts != 0) and (acts != 0).any()
    close(mine.feature_acts.to_dense(), acts, "feature_acts")
    fired, expected = mine.feature_acts.bool().float(), acts.bool().float()
    for dim in (-2, 0, -1, 1):
        assert torch.equal(fired.sum(dim), expected.sum(dim))
    if not coo:  # its backward fails on the CPU
        check_gradients(stock, ours, theirs.loss, mine.loss)
    for name, buffer in stock.named_buffers():
        close(dict(ours.named_buffers())[name], buffer, name)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["step", "quadratic", "tanh", "to input", "tanh to input"])
def test_jumprelu_on_thresholds_and_edges(kind: str, centred: bool) -> None:
    """Exact pre-activations, many on a threshold or on an edge of its window."""
    stock = make(TRAINED[kind], apply_b_dec_to_input=centred)
    generator = torch.Generator().manual_seed(7)

    def whole(*shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    with torch.no_grad():
        stock.W_enc.copy_(whole(D, F) * BANDWIDTH / 4)
        stock.b_enc.copy_(whole(F) * BANDWIDTH / 2 - 2 * BANDWIDTH * centred)
        stock.b_dec.copy_(whole(D))
        stock.threshold.copy_(whole(F, low=4, high=9) * BANDWIDTH / 2)
        x = whole(N, D)
        pre = (x - stock.b_dec * centred) @ stock.W_enc + stock.b_enc
        u = (pre - stock.threshold) / BANDWIDTH
        assert all((u == at).sum() > 20 for at in (-0.5, 0, 0.5))
    ours = copy.deepcopy(stock)
    saelens.accelerate(ours)
    theirs = stock.training_forward_pass(step_input(x))
    mine = ours.training_forward_pass(step_input(x))
    assert torch.equal(mine.feature_acts != 0, theirs.feature_acts != 0)
    assert isinstance(mine.feature_acts, LazyActs)
    close(mine.loss, theirs.loss, "loss")
    check_gradients(stock, ours, theirs.loss, mine.loss)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", [*INFERENCE, *(k for k in TRAINED if k != "topk coo")])
def test_encode_decode_forward(kind: str, rank: int) -> None:
    """Values, and gradients of x and of every parameter through `sae(x)` and `sae.encode(x)`."""
    stock, ours = pair((INFERENCE | TRAINED)[kind])
    given = batch(0) if rank == 2 else batch(0).view(8, 5, D)
    x, y = given.clone().requires_grad_(), given.clone().requires_grad_()
    acts, mine = stock.encode(x), ours.encode(y)
    assert type(mine) is Tensor and torch.equal(mine != 0, acts != 0) and (acts != 0).any()
    close(mine, acts, "encode")
    check_gradients(stock, ours, acts.square().sum(), mine.square().sum(), x, y)
    x.grad, y.grad = None, None
    recon, mine = stock(x), ours(y)
    close(mine, recon, "forward")
    check_gradients(stock, ours, recon.square().sum(), mine.square().sum(), x, y)
    with torch.no_grad():
        stock.encode(given), ours.encode(given)  # norms of the input that decode undoes
        close(ours.decode(acts.detach()), stock.decode(acts.detach()), "decode")


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "transcoder"])
def test_decode_passes_gradients_to_zeros(kind: str) -> None:
    stock, ours = pair(INFERENCE[kind])
    acts = stock.encode(batch(0)).detach()
    x, y = acts.clone().requires_grad_(), acts.clone().requires_grad_()
    check_gradients(
        stock, ours, *(m.decode(t).square().sum() for m, t in ((stock, x), (ours, y))), x, y
    )
    assert x.grad[acts == 0].any()


@pytest.mark.parametrize("kind", [k for k in TRAINED if k != "topk coo"])
def test_no_dense_tensor_in_a_step_and_its_statistics(kind: str, installed: None) -> None:
    module, n = make(TRAINED[kind]), 160
    with Largest() as seen:
        output = module.training_forward_pass(step_input(batch(0, n), "few"))
        fired = output.feature_acts.bool().float()
        assert not fired.is_sparse and fired.sum(-2).bool().any() and fired.sum(0).any()
        fired.sum(-1).to_dense().mean()
        output.loss.backward()
    assert n * F > seen.elements > 0
    with Largest() as seen:
        output.feature_acts + 1
    assert seen.elements == n * F


@pytest.mark.parametrize("kind", INFERENCE)
def test_no_dense_tensor_in_forward(kind: str, installed: None) -> None:
    module, x = make(INFERENCE[kind]), batch(0, 160)
    with torch.no_grad(), Largest() as seen:
        module(x)
    assert 0 < seen.elements < 160 * F


@pytest.mark.parametrize("kind", ["step", "topk", "batchtopk", "matryoshka"])
def test_autocast(kind: str) -> None:
    """Products of bfloat16 operands: SAELens rounds the pre-activations, we do not."""
    stock, ours = pair(TRAINED[kind])
    given = step_input(batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = stock.training_forward_pass(given), ours.training_forward_pass(given)
    assert isinstance(mine.feature_acts, LazyActs) and mine.sae_out.dtype == theirs.sae_out.dtype
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=0.02, atol=0)
    mine.loss.backward(), theirs.loss.backward()
    for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
        if p.grad is not None and p.grad.dim() == 2:
            assert p.grad.dtype == q.grad.dtype
            assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.99


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "transcoder"])
def test_bfloat16_weights(kind: str) -> None:
    """Nearer to float32 than SAELens, which rounds the pre-activations before its gate."""
    stock, ours = (m.to(torch.bfloat16) for m in pair(INFERENCE[kind]))
    truth, x = copy.deepcopy(stock).to(torch.float32), batch(0).to(torch.bfloat16)
    with torch.no_grad():
        acts, mine = stock.encode(x), ours.encode(x)
        assert mine.dtype == acts.dtype == ours(x).dtype == torch.bfloat16
        assert ((acts != 0) != (mine != 0)).float().mean() < 0.01
        off, theirs = ((m(x).float() - truth(x.float())).norm() for m in (ours, stock))
    assert off <= theirs


def test_empty_batches_and_single_tokens() -> None:
    for kind in ("jumprelu", "topk", "transcoder"):
        stock, ours = pair(INFERENCE[kind])
        for shape in ((0, D), (D,), (1, 1, D)):
            x = torch.randn(shape)
            close(ours(x), stock(x), kind)
            close(ours.encode(x), stock.encode(x), kind)


def test_a_negative_threshold_acts_as_0() -> None:
    stock, ours = pair(INFERENCE["jumprelu"])
    for module in (stock, ours):
        module.threshold.data.fill_(-0.5)
        module.b_enc.data.sub_(1.5)
    close(ours(batch(0)), stock(batch(0)), "forward")
    assert torch.equal(ours.encode(batch(0)) != 0, stock.encode(batch(0)) != 0)
