"""Running thresholds of a BatchTopK over several layers: one per layer, moved by training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import assert_same
from test_multilayer import D, F, L, build
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import BatchTopK, queries
from gemmascope_fast.multilayer import MultiLayer

KINDS = ["crosscoder", "clt", "affine clt"]
DECAY = 0.9


def running(kind: str = "crosscoder", **options: Any) -> MultiLayer:
    return build(kind, BatchTopK(2.5), **({"ema_decay": DECAY} | options))


def trained(kind: str = "crosscoder", **options: Any) -> MultiLayer:
    """A module whose thresholds have seen two batches."""
    module = running(kind, **options)
    for scale in (1.0, 1.3):
        module.encode(batch(scale))
    return module


def batch(scale: float = 1.0, n: int = 29) -> Tensor:
    """Layers of different sizes, so that their thresholds differ."""
    return scale * torch.randn(n, L, D) * torch.tensor([1.0, 2.0, 5.0])[:, None]


def smallest(module: MultiLayer, x: Tensor) -> Tensor:
    """`[L]` float64: smallest of the `int(k n)` largest pre-activations of each layer."""
    found = []
    for layer, part in enumerate(x.unbind(-2)):
        pre = (part @ module.W_enc[layer] + module.b_enc[layer]).relu().flatten()
        found.append(pre.topk(int(2.5 * len(x))).values[-1])
    return torch.stack(found).detach().double()


def test_each_layer_follows_its_own_smallest_activation() -> None:
    module, expected = running(), None
    assert module.ema_threshold.dtype == torch.float64 and bool((module.ema_threshold == -1).all())
    for step in range(4):
        x = batch(1.0 + step)
        module.loss(x) if step % 2 else module.encode(x)
        least = smallest(module, x)
        expected = least if expected is None else DECAY * expected + (1 - DECAY) * least
        torch.testing.assert_close(module.ema_threshold, expected, rtol=1e-6, atol=0)
    assert "ema_threshold" in module.state_dict()
    before = module.ema_threshold.clone()
    module.encode_layer(1, batch(9.0)[:, 1])
    assert (module.ema_threshold == before).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_encodes_with_them(kind: str) -> None:
    module, x = trained(kind).eval(), batch()
    before = module.ema_threshold.clone()
    acts = module.encode(x)
    for layer, part in enumerate(x.unbind(-2)):
        pre = part @ module.W_enc[layer] + module.b_enc[layer]
        expected = torch.where(pre > before[layer].float(), pre, 0.0)
        torch.testing.assert_close(acts[layer].to_dense(), expected, rtol=1e-5, atol=1e-6)
    counts = torch.cat([a.counts().long() for a in acts])
    assert int(counts.sum()) != L * int(2.5 * len(x))  # what the batch's selection would keep
    assert_same(module.count_latents(x)[0], counts)
    found = gsf.evaluate(module.train(), x, x)
    assert_same(found.counts, counts)
    assert module.training and torch.equal(module.ema_threshold, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_in_evaluation_mode_is_of_those_activations(kind: str) -> None:
    module, x = trained(kind).eval(), batch()
    given = (x,) if kind == "crosscoder" else (x, x)
    loss, metrics = module.loss(*given)
    acts = module.encode(x)
    recon = module(x)
    torch.testing.assert_close(metrics["l0"], module.l0(acts).sum(-1).mean())
    expected = (recon - x).square().sum((1, 2)).mean()
    torch.testing.assert_close(loss, expected)
    parameters = list(module.parameters())
    ours = torch.autograd.grad(loss, parameters)
    for grad, true in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-4)


def test_without_a_decay_there_are_none() -> None:
    module, x = build("crosscoder", BatchTopK(2.5)), batch()
    assert module.ema_threshold is None
    expected = module.encode(x)
    for ours, theirs in zip(module.eval().encode(x), expected, strict=True):
        assert_same(ours.values, theirs.values)
    assert gsf.Crosscoder(L, D, F, ema_decay=DECAY).ema_threshold is None


def test_nothing_active_moves_nothing() -> None:
    module = trained()
    before = module.ema_threshold.clone()
    for x in (torch.zeros(0, L, D), torch.full((2, L, D), torch.nan)):
        module.encode(x)
        module.loss(x)
    assert_same(module.ema_threshold, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_they_stay_exact_where_the_module_is_moved(dtype: torch.dtype) -> None:
    module = trained()
    before = module.ema_threshold.clone()
    assert_same(module.to(dtype).ema_threshold, before)
    other = running()
    other.load_state_dict({name: t.contiguous() for name, t in module.state_dict().items()})
    assert_same(other.ema_threshold, before)
    empty = gsf.Crosscoder(L, D, F, BatchTopK(2), ema_decay=DECAY, device="meta")
    assert empty.to_empty(device="cpu").ema_threshold.dtype == torch.float64
    single = gsf.SAE(D, F, BatchTopK(2), semantics=gsf.Semantics(ema_decay=0.9), device="meta")
    assert single.to_empty(device="cpu").ema_threshold.dtype == torch.float64


@pytest.mark.parametrize("packed", [True, [True, False, True]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_to_jumprelu(kind: str, packed: Any, tmp_path: Any) -> None:
    module, x = trained(kind, packed=packed).eval(), batch()
    module.metadata = {"l0": 7.5}
    state = torch.get_rng_state()
    plain = module.to_jumprelu(bandwidth=0.07)
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.activation == gsf.JumpReLU(0.07) and plain.ema_threshold is None
    assert not plain.training and plain.metadata == module.metadata is not plain.metadata
    for layer, threshold in enumerate(plain.threshold):
        assert_same(threshold.detach(), module.ema_threshold[layer].float().expand(F))
    with torch.no_grad():
        for ours, theirs in zip(plain.encode(x), module.encode(x), strict=True):
            assert_same(ours.indices, theirs.indices)
            assert_same(ours.values, theirs.values)
        assert_same(plain(x), module(x))
        plain.save_pretrained(tmp_path)
        assert_same(gsf.load(tmp_path)(x), module(x))
        plain.b_dec.add_(1)
        assert not torch.equal(plain.b_dec, module.b_dec)
    jumps = build(kind, packed=packed)
    again = jumps.to_jumprelu(bandwidth=0.3)
    assert again.activation == gsf.JumpReLU(0.3)
    for p, q in zip(again.parameters(), jumps.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
        assert p.requires_grad and p.stride() == q.stride()


def test_conversion_refuses_what_has_no_thresholds() -> None:
    for module, text in (
        (build("clt", gsf.TopK(2)), r"to_jumprelu: TopK\(k=2\) has no thresholds"),
        (build("clt", BatchTopK(2)), r"to_jumprelu: BatchTopK\(k=2\) has no thresholds: .*decay"),
        (running(), "to_jumprelu: a running threshold has not seen a batch yet"),
    ):
        with pytest.raises(ValueError, match=text):
            module.to_jumprelu()
    with pytest.raises(ValueError, match="to_jumprelu: bandwidth must be finite and >= 0, got -1"):
        trained().to_jumprelu(bandwidth=-1)
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1.0"):
        running(ema_decay=1.0)
    with pytest.raises(ValueError, match="Gemma Scope 2's files hold JumpReLU only"):
        trained().save_pretrained("unused")


def test_frozen_and_queried_it_has_the_same_bits() -> None:
    module, x = trained().eval(), batch()
    latents = torch.tensor([30, 2, 17, 0, 36])
    with torch.no_grad():
        expected = module.encode(x)
    for freezing in (False, True):
        if freezing:
            module.freeze()
        for layer in range(L):
            found = queries.encode_latents(module, x[:, layer], latents, layer=layer)
            assert_same(found.detach(), expected[layer].to_dense()[:, latents])
        with torch.no_grad():
            for ours, theirs in zip(module.encode(x), expected, strict=True):
                assert_same(ours.values, theirs.values)
    training = trained()
    before = training.ema_threshold.clone()
    queries.encode_latents(training, x[:, 0], latents, layer=0)
    assert_same(training.ema_threshold, before)


def test_training_compiles_to_one_graph() -> None:
    """Its running thresholds move inside the graph."""
    made = running(layers=2)
    other = copy.deepcopy(made)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            x = batch()[:, :2]
            assert_same(compiled(x).detach(), made(x).detach())
            assert_same(other.ema_threshold, made.ema_threshold)
    assert bool((made.ema_threshold > 0).all())
