"""sparsify's optimizers with the backend installed: the updates are its own, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import peer  # noqa: F401  (its environment)
import pytest
import torch
from torch import Tensor

host = pytest.importorskip("sparsify", reason="eai-sparsify is not installed: see `make peers`")
from schedulefree import ScheduleFreeWrapper  # noqa: E402
from sparsify.sign_sgd import SignSGD  # noqa: E402

from gemmascope_fast.integrations import sparsify as gsf_sparsify  # noqa: E402
from gemmascope_fast.integrations import sparsify_optim  # noqa: E402

STOCK = ScheduleFreeWrapper.step, host.Trainer.__init__


def made(**options: Any) -> tuple[Any, list[Tensor]]:
    """Its default optimizer over two groups, of three blocks and a bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 50), (50,), (3,), (11, 9)]
    tensors = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    groups = [{"params": tensors[:2], "lr": 1e-2}, {"params": tensors[2:], "lr": 3e-3}]
    wrapped = ScheduleFreeWrapper(SignSGD(groups), **{"momentum": 0.95, **options})
    wrapped.train()
    return wrapped, tensors


def steps(wrapped: Any, tensors: list[Tensor]) -> list[Tensor]:
    """What the parameters are after each of five steps; one of them has no gradient at first."""
    generator, seen = torch.Generator().manual_seed(1), []
    for step in range(5):
        for t in tensors:
            t.grad = torch.randn(t.shape, generator=generator).round()
        tensors[2].grad = None if step < 2 else tensors[2].grad
        wrapped.param_groups[0]["lr"] *= 0.9
        wrapped.step()
        if step == 3:
            wrapped.eval()
            wrapped.train()
        seen += [t.detach().clone() for t in tensors]
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"r": 0.5, "weight_lr_power": 1.0}, {"weight_decay_at_y": 0.1}], ids=str
)
def test_default_optimizer_keeps_its_bits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsify_optim, "BLOCK", 112)
    stock, theirs = made(**options)
    ours, mine = made(**options)
    expected = steps(stock, theirs)
    with gsf_sparsify.install():
        found = steps(ours, mine)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(ours.state[a]["z"], stock.state[b]["z"])
    for a, b in zip(ours.param_groups, stock.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


def test_what_listens_to_the_inner_optimizer_is_called() -> None:
    wrapped, tensors = made()
    calls: list[Any] = []
    with gsf_sparsify.install():
        handle = wrapped.base.register_step_post_hook(lambda *given: calls.append(given))
        steps(wrapped, tensors)
        assert len(calls) == 5
        handle.remove()
        steps(wrapped, tensors)
        assert len(calls) == 5
        wrapped.eval()
        with pytest.raises(Exception, match="not in train mode"):
            wrapped.step()


def trainer(optimizer: str) -> Any:
    """Its trainer over a model with random weights."""
    from sparsify import SparseCoderConfig, TrainConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    ids = torch.randint(50, (12, 8), generator=torch.Generator().manual_seed(0))
    coder = SparseCoderConfig(num_latents=64, k=4)
    run = TrainConfig(
        coder, batch_size=4, hookpoints=["h.0"], optimizer=optimizer, log_to_wandb=False
    )
    return host.Trainer(run, [{"input_ids": row} for row in ids], model)


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_its_trainer_fits_the_same(
    optimizer: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where it saves
    stock = trainer(optimizer)
    before = copy.deepcopy(next(iter(stock.saes.values())).state_dict())
    stock.fit()
    with gsf_sparsify.install(strict_compat=True):
        ours = trainer(optimizer)
        assert optimizer != "adam" or ours.optimizers[0].param_groups[0]["fused"] is True
        ours.fit()
    (theirs,), (mine,) = stock.saes.values(), ours.saes.values()
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(expected, before[name]), name


def test_uninstall_gives_the_optimizers_back() -> None:
    gsf_sparsify.install()
    gsf_sparsify.install()
    assert ScheduleFreeWrapper.step is not STOCK[0]
    gsf_sparsify.uninstall()
    assert (ScheduleFreeWrapper.step, host.Trainer.__init__) == STOCK
    with gsf_sparsify.install(fused_optimizers=False):
        assert (ScheduleFreeWrapper.step, host.Trainer.__init__) == STOCK
    with gsf_sparsify.accelerate(host.SparseCoder(8, host.SparseCoderConfig(num_latents=9))):
        assert (ScheduleFreeWrapper.step, host.Trainer.__init__) == STOCK
