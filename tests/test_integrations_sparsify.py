"""What needs no sparsify: its two functions against dense computations, and its absence."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gemmascope_fast.integrations import dictionary_learning, sparsify
from gemmascope_fast.integrations.sparsify_ops import decode, encode, remove_parallel_
from gemmascope_fast.integrations.sparsify_pre_acts import PreActs

N, D, F, K = 16, 12, 64, 4
DEAD = torch.arange(F) % 3 == 0


def problem(shift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (F, D), (F,), (F, D))
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    found[2] += shift
    return [t.requires_grad_() for t in found]


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_encoder_is_topk_of_relu(shift: float) -> None:
    """With the shift most of what is selected is 0, and passes nothing."""
    inputs = problem(shift)
    x, weight, bias, W_dec = inputs
    values, latents, _ = encode(x, weight, bias, K, strict=False)
    expected = linear(x, weight, bias).relu().topk(K)
    torch.testing.assert_close(values, expected.values)
    assert latents.dtype == torch.int64
    active = expected.values > 0
    assert torch.equal(latents[active], expected.indices[active])
    assert bool(active.all()) == (shift == 0)
    recon = decode(latents, values, W_dec)
    dense = nn.functional.embedding_bag(
        expected.indices, W_dec, mode="sum", per_sample_weights=expected.values
    )
    torch.testing.assert_close(recon, dense, rtol=1e-4, atol=1e-5)
    target = torch.randn(N, D)
    same(*(gradients((r - target).square().sum(), inputs) for r in (recon, dense)))


def test_strict_gradients_pass_zeros() -> None:
    x, weight, bias, _ = problem(-1e3)
    for strict in (False, True):
        values, latents, pre = encode(x, weight, bias, K, strict=strict)
        assert not values.any()
        found = gradients(values.sum(), [x, weight, bias])
        assert found[2].sum() == (N * K if strict else 0)
        if strict:
            assert torch.equal(found[2], torch.bincount(latents.flatten(), minlength=F).float())
            torch.testing.assert_close(found[0], weight[latents].sum(1), rtol=1e-4, atol=1e-5)
        assert pre.sum().requires_grad == (not strict)


@pytest.mark.parametrize("k", [3, 22])
def test_auxk_of_the_dead_latents(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem()
    x, weight, bias, W_dec = inputs
    pre = linear(x, weight, bias).relu()
    expected = torch.where(DEAD[None], pre, -torch.inf).topk(k, sorted=False)
    lazy = encode(x, weight, bias, K, strict=False)[2]
    monkeypatch.setattr(PreActs, "dense", lambda self: pytest.fail("dense"))
    found = torch.where(DEAD[None], lazy, -torch.inf).topk(k, sorted=False)
    recon = [decode(one.indices, one.values, W_dec) for one in (found, expected)]
    torch.testing.assert_close(*recon, rtol=1e-4, atol=1e-5)
    same(*(gradients(r.square().sum(), inputs) for r in recon))


def test_pre_acts_stand_for_the_dense_tensor() -> None:
    x, weight, bias, _ = problem()
    pre = linear(x, weight, bias).relu()

    def lazy() -> Tensor:
        return encode(x, weight, bias, K, strict=False)[2]

    made = lazy()
    assert isinstance(made, torch.Tensor) and made.shape == pre.shape and made.dtype == pre.dtype
    assert len(made) == N and made.dim() == 2 and made.device == pre.device
    assert "computed when used" in repr(made)
    assert torch.equal(lazy() > 0, pre > 0)
    torch.testing.assert_close(lazy()[3, :5] * 2, 2 * pre[3, :5])
    torch.testing.assert_close(torch.cat([lazy(), made]), torch.cat([pre, pre]))
    torch.testing.assert_close(lazy().topk(2, largest=False)[0], pre.topk(2, largest=False)[0])
    for given in (lazy(), made):  # before and after there are elements
        masked, expected = (torch.where(DEAD, t, -torch.inf) for t in (given, pre))
        torch.testing.assert_close(masked.topk(40)[0], expected.topk(40)[0])
        torch.testing.assert_close(masked.exp(), expected.exp())
        torch.testing.assert_close(given.topk(3)[0], pre.topk(3)[0])
        torch.testing.assert_close(torch.where(DEAD, given, 0.0), torch.where(DEAD, pre, 0.0))
    same(*(gradients(t.square().sum(), [x, weight, bias]) for t in (lazy(), pre)))
    with torch.no_grad():
        unread, total = lazy(), made.sum()
        assert not total.requires_grad and made.requires_grad
        weight.add_(1)
        assert torch.equal(made.sum(), total)
    with pytest.raises(RuntimeError, match="pre_acts: the coder's input or weights changed after"):
        unread.sum()
    with pytest.raises(RuntimeError, match="pre_acts: the coder's input or weights changed after"):
        unread.topk(3)


def test_latents_edited_after_encoding_are_read_again() -> None:
    x, weight, bias, W_dec = problem()
    values, latents, _ = encode(x, weight, bias, K, strict=False)
    latents[:, 0] = 7
    expected = (values[..., None] * W_dec[latents]).sum(1)
    torch.testing.assert_close(decode(latents, values, W_dec), expected, rtol=1e-4, atol=1e-5)
    twice = torch.tensor([[5, 5]])  # as embedding_bag: both count
    torch.testing.assert_close(decode(twice, torch.ones(1, 2), W_dec)[0], 2 * W_dec[5])


def test_compiled_as_one_graph() -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor, W_dec: Tensor) -> Tensor:
        values, latents, pre = encode(x, weight, bias, K, strict=False)
        assert not isinstance(pre, PreActs)
        return decode(latents, values, W_dec)

    inputs = problem()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    values, latents, _ = encode(*inputs[:3], K, strict=False)
    plain = decode(latents, values, inputs[3])
    torch.testing.assert_close(compiled(*inputs), plain)
    same(*(gradients(r.square().sum(), inputs) for r in (compiled(*inputs), plain)))


@pytest.mark.parametrize("hit", [F, 20])
def test_projection(hit: int) -> None:
    gradient, W_dec = torch.randn(F, D), torch.randn(F, D)
    gradient[hit:] = 0
    expected = gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec
    remove_parallel_(gradient, W_dec)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("host", "name"), [(sparsify, "eai-sparsify"), (dictionary_learning, "dictionary-learning")]
)
def test_absence_and_other_versions(host: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise metadata.PackageNotFoundError(distribution)

    for version in (absent, lambda _: "7.0"):
        monkeypatch.setattr(metadata, "version", version)
        for refused in (host.install, lambda: host.accelerate(nn.Linear(2, 2))):
            with pytest.raises(ImportError, match=name):
                refused()
    host.uninstall()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package that is laid out like sparsify and computes nothing."""

    class SparseCoder(nn.Module):
        def remove_gradient_parallel_to_decoder_directions(self) -> str:
            return "stock"

    def fused_encoder(*args: Any) -> str:
        return "stock"

    def decoder_impl(*args: Any) -> str:
        return "stock"

    modules = {n: ModuleType(n) for n in ("sparsify", "sparsify.fused_encoder", "sparsify.utils")}
    modules["sparsify.late"] = ModuleType("sparsify.late")
    vars(modules["sparsify"]).update(SparseCoder=SparseCoder)
    vars(modules["sparsify.fused_encoder"]).update(fused_encoder=fused_encoder)
    vars(modules["sparsify.utils"]).update(decoder_impl=decoder_impl)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(metadata, "version", lambda _: "1.3.3")
    return SimpleNamespace(
        late=modules["sparsify.late"],
        utils=modules["sparsify.utils"],
        names=lambda: (
            modules["sparsify.fused_encoder"].fused_encoder,
            modules["sparsify.utils"].decoder_impl,
            SparseCoder.remove_gradient_parallel_to_decoder_directions,
        ),
        coder=SparseCoder(),
    )


def test_names_are_restored_wherever_they_went(fake: SimpleNamespace) -> None:
    before = fake.names()
    with sparsify.install(fused_optimizers=False):
        assert fake.names() == tuple(sparsify.OURS.values())
        fake.late.taken = fake.utils.decoder_impl
        kept = fake.utils.decoder_impl
        with sparsify.accelerate(fake.coder):
            sparsify.uninstall()
            assert fake.names() == tuple(sparsify.OURS.values())
    assert fake.names() == before and fake.late.taken is before[1]
    assert kept(None, None, torch.zeros(2, 2)) == "stock"


def test_a_foreign_change_stays(fake: SimpleNamespace) -> None:
    with sparsify.install(fused_optimizers=False):
        foreign = fake.utils.decoder_impl = lambda *args: "foreign"
    assert fake.utils.decoder_impl is foreign


def test_an_install_that_fails_changes_nothing(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    before = fake.names()
    with pytest.raises(ImportError, match="schedulefree"):
        sparsify.install()
    assert fake.names() == before and not sparsify._installed
