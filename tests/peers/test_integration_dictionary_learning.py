"""dictionary_learning's trainers and dictionaries on entries, beside the library's own."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import peer
import pytest
import torch
from peer import BANDWIDTH, DEAD, D, F, batch, close
from torch import Tensor

from gemmascope_fast.integrations import dictionary_learning as fast

REASON = "dictionary-learning is not installed: see `make peers`"
library = pytest.importorskip("dictionary_learning.trainers", reason=REASON)
nested = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
RUN = {"layer": 0, "lm_name": "none", "device": "cpu", "activation_dim": D, "dict_size": F}

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "TopKTrainer": (library.TopKTrainer, {"k": 5}),
    "BatchTopKTrainer": (library.BatchTopKTrainer, {"k": 5}),
    "MatryoshkaBatchTopKTrainer": (
        nested.MatryoshkaBatchTopKTrainer,
        {"k": 5, "group_fractions": [0.25, 0.25, 0.5], "group_weights": [1.0, 2.0, 3.0]},
    ),
    "JumpReluTrainer": (
        library.JumpReluTrainer,
        {
            "bandwidth": BANDWIDTH,
            "sparsity_penalty": 3.0,
            "sparsity_warmup_steps": 20,
            "target_l0": 12.0,
        },
    ),
}
SELECTING = [kind for kind in KINDS if kind != "JumpReluTrainer"]
STATISTICS = ("effective_l0", "dead_features", "pre_norm_auxk_loss", "num_tokens_since_fired")


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    before = {cls: dict(vars(cls)) for cls, _ in KINDS.values()}
    yield
    fast.uninstall()
    for cls, found in before.items():
        assert dict(vars(cls)) == found


def trainer(kind: str, cls: Any = None, *, fresh: bool = False, **options: Any) -> Any:
    """Of random weights; of the library's initial ones with `fresh`."""
    torch.manual_seed(0)
    stock, own = KINDS[kind]
    run = {"steps": 1000, "warmup_steps": 10, **RUN, **own, **options}
    made = (cls or stock)(**run)
    if not fresh:
        with torch.no_grad():
            for name, p in made.ae.named_parameters():
                p.copy_(torch.randn_like(p.contiguous()) * 0.3)
                if name == "threshold":
                    p.copy_(0.5 + torch.rand(F))
    return made


def steps(made: Any, mask: Tensor | None, count: int = 3) -> list[tuple[Any, ...]]:
    """Losses, gradients and statistics of some batches."""
    found = []
    if mask is not None:
        made.dead_feature_threshold = 10**6
        made.num_tokens_since_fired = 10**7 * mask.long()
    for step in range(count):
        loss = made.loss(batch(step), step=5000 + step)
        gradients = torch.autograd.grad(loss, list(made.ae.parameters()))
        counts = [made.__dict__.get(name) for name in STATISTICS]
        found.append((loss, *gradients, made.ae.threshold, *counts))
    return copy.deepcopy([[_plain(t) for t in one] for one in found])  # type: ignore[misc]


def _plain(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


def same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if isinstance(other, Tensor) and other.is_floating_point():
                close(one, other, f"item {at}")
            elif other is None:
                assert one is None
            else:
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), f"item {at}"


@pytest.mark.parametrize("idle", ["none", *DEAD])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_statistics(kind: str, idle: str) -> None:
    mask = None if idle == "none" else DEAD[idle]
    expected = steps(trainer(kind), mask)
    made = trainer(kind)
    with fast.accelerate(made, strict_compat=True):
        same(steps(made, mask), expected)
    with fast.install(strict_compat=True):
        same(steps(trainer(kind), mask), expected)
    same(steps(trainer(kind), mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dict_class_and_trainer_class(kind: str) -> None:
    """Ours under the library's trainer; our trainer, which needs neither install nor ours."""
    expected = steps(trainer(kind), DEAD["many"])
    name = type(trainer(kind).ae).__name__
    same(steps(trainer(kind, dict_class=getattr(fast, name)), DEAD["many"]), expected)
    ours = trainer(kind, getattr(fast, kind))
    ours.strict_compat = True
    same(steps(ours, DEAD["many"]), expected)
    assert ours.config == trainer(kind).config


def test_the_l0_gradient_reaches_thresholds_from_below() -> None:
    """Unlike the library's, except under `strict_compat`."""
    with fast.install():
        found = steps(trainer("JumpReluTrainer"), None)[0]
    expected = steps(trainer("JumpReluTrainer"), None)[0]
    names = [name for name, _ in trainer("JumpReluTrainer").ae.named_parameters()]
    for name, one, other in zip(names, found[1:], expected[1:], strict=False):
        assert peer.differs(one, other) == (name == "threshold"), name


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_activations_are_formed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmascope_fast.sparse import SparseActs

    made = trainer(kind)
    monkeypatch.setattr(SparseActs, "to_dense", lambda self: pytest.fail("dense"))
    monkeypatch.setattr(type(made.ae), "encode", lambda *a, **k: pytest.fail("dense"))
    with fast.accelerate(made):
        steps(made, DEAD["many"])
        made.ae(batch(0))


@pytest.mark.parametrize("kind", KINDS)
def test_200_updates(kind: str) -> None:
    directions = torch.randn(2 * D, D, generator=torch.Generator().manual_seed(1))

    def data(step: int) -> Tensor:
        codes = torch.rand(64, 2 * D, generator=torch.Generator().manual_seed(step))
        return (codes * (codes > 0.9)) @ directions

    def train(cls: Any = None) -> tuple[Tensor, float, float]:
        made = trainer(kind, cls, fresh=True, lr=1e-3)
        made.strict_compat = True
        if kind == "JumpReluTrainer":  # above half the bandwidth, where its gradient is ours
            made.ae.threshold.data.fill_(0.5)
        made.dead_feature_threshold = 320
        losses = torch.tensor([made.update(step, data(step)) for step in range(200)])
        log = made.loss(data(1000), step=200, logging=True)
        return losses, float((log[2] != 0).float().sum(1).mean()), log.losses["l2_loss"]

    expected, l0, mse = train()
    found, our_l0, our_mse = train(getattr(fast, kind))
    assert expected[-10:].mean() < 0.9 * expected[5:15].mean()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    assert abs(our_l0 / l0 - 1) < 0.01
    assert abs(our_mse / mse - 1) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_logs(kind: str) -> None:
    expected = trainer(kind).loss(batch(0), step=0, logging=True)
    with fast.install(strict_compat=True):
        found = trainer(kind).loss(batch(0), step=0, logging=True)
    assert found._fields == expected._fields and found.losses.keys() == expected.losses.keys()
    for one, other in zip(found[:3], expected[:3], strict=True):
        close(one, other, "log")
    for name, value in expected.losses.items():
        assert found.losses[name] == pytest.approx(value, rel=1e-5), name


def encodings(ae: Any, kind: str, x: Tensor) -> list[Tensor]:
    options: list[dict[str, Any]] = [{}]
    if kind != "JumpReluTrainer":
        flag = "return_topk" if kind == "TopKTrainer" else "return_active"
        options = [{"use_threshold": u, flag: r} for u in (False, True) for r in (False, True)]
    else:
        options.append({"output_pre_jump": True})
    found = [ae.encode(x, **option) for option in options]
    flat = [t for one in found for t in (one if isinstance(one, tuple) else (one,))]
    return [*flat, ae(x), *ae(x, output_features=True)]


@pytest.mark.parametrize("threshold", [-1.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_inference(kind: str, threshold: float) -> None:
    ae, x = trainer(kind).ae, batch(0).requires_grad_()
    with torch.no_grad():
        ae.threshold.fill_(threshold)
    if kind.startswith("Matryoshka"):
        ae.active_groups = 2
    expected = encodings(ae, kind, x)
    with fast.accelerate(ae):
        found = encodings(ae, kind, x)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            if other.is_floating_point() and other.dim() == 2 and other.shape[1] != 5:
                assert torch.equal(one != 0, other != 0)
                close(one, other, "encoding")
        mine = torch.autograd.grad(ae(x).square().sum(), x)[0]
    close(mine, torch.autograd.grad(expected[-3].square().sum(), x)[0], "d_x")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_dictionaries_are_the_librarys(kind: str, tmp_path: Any) -> None:
    stock, made = trainer(kind), trainer(kind, getattr(fast, kind))
    made.ae.load_state_dict(stock.ae.state_dict())
    state = {name: t.cpu() for name, t in made.ae.state_dict().items()}
    assert list(state) == list(stock.ae.state_dict())
    torch.save(state, tmp_path / "ae.pt")
    again = type(stock.ae).from_pretrained(tmp_path / "ae.pt")
    assert type(again).__module__.startswith("dictionary_learning")
    for name, t in again.state_dict().items():
        assert torch.equal(t, stock.ae.state_dict()[name]), name
    ours = getattr(fast, type(again).__name__).from_pretrained(tmp_path / "ae.pt")
    close(ours(batch(0)), again(batch(0)), "loaded")


def test_undoing_restores_classes_and_layouts() -> None:
    made = trainer("TopKTrainer")
    kinds, strides = (type(made), type(made.ae)), made.ae.decoder.weight.stride()
    with pytest.raises(KeyError), fast.accelerate(made):
        assert type(made) is fast.TopKTrainer and type(made.ae) is fast.AutoEncoderTopK
        assert made.ae.decoder.weight.t().is_contiguous()
        raise KeyError
    assert (type(made), type(made.ae)) == kinds
    assert made.ae.decoder.weight.stride() == strides
    assert "strict_compat" not in vars(made)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="accelerate: obj must be one of AutoEncoderTopK, .* got L"):
        fast.accelerate(torch.nn.Linear(2, 3))
    with pytest.raises(AttributeError, match="GatedAutoEncoder"):
        fast.GatedAutoEncoder  # noqa: B018
