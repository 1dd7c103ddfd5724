"""`module.screen()` on a GPU: a module that trains on int8 codes, which follow its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same
from test_screened_device import DEVICE, absent

import gemmascope_fast as gsf
from gemmascope_fast import screening

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent())

D, F = 256, 900


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy sizes have more candidates per entry than pays."""
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was quantised when: "pack", "all" or "moved"."""
    log: list[str] = []
    pack, repack = screening.pack, screening.repack

    def packing(*args: Any, **options: Any) -> gsf.PackedEncoder:
        log.append("pack")
        return pack(*args, **options)

    def packing_again(codes: torch.Tensor, W_enc: torch.Tensor, *moved: Any) -> None:
        log.append("moved" if moved else "all")
        repack(codes, W_enc, *moved)

    monkeypatch.setattr(screening, "pack", packing)
    monkeypatch.setattr(screening, "repack", packing_again)
    return log


def sae(dtype: torch.dtype = torch.bfloat16, d: int = D, threshold: float = 2.2) -> gsf.SAE:
    g = torch.Generator(DEVICE).manual_seed(1)
    return gsf.SAE(d, F, gsf.JumpReLU(0.2, threshold), device=DEVICE, dtype=dtype, generator=g)


def batch(step: int, n: int = 10, d: int = D) -> torch.Tensor:
    g = torch.Generator().manual_seed(50 + step)
    return torch.randn(n, d, generator=g).to(DEVICE, torch.bfloat16)


def loss_of(module: gsf.SAE, x: torch.Tensor) -> torch.Tensor:
    acts = module.encode(x)
    error = (module.decode(acts).float() - x.float()).square().sum(-1).mean()
    return error + 1e-2 * acts.l0().mean()


def train(module: gsf.SAE, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_of(module, batch(step))
    loss.backward()
    optimizer.step()
    return loss.detach()


def codes_of(module: gsf.SAE) -> torch.Tensor:
    assert module.screened is not None
    packed = module.screened.encoder(module.W_enc)
    assert isinstance(packed, gsf.PackedEncoder) and packed.codes is not None
    return packed.codes


def assert_current(module: gsf.SAE, center: torch.Tensor | None = None) -> None:
    """Every byte as of packing anew, and the entries of the plain encoder."""
    anew = gsf.pack(module.W_enc.detach(), center=center, precision="screened").codes
    assert_same(codes_of(module), anew)
    x = batch(99, 64)
    with torch.no_grad():
        acts = module.encode(x)
    assert gsf.explain().path == "screened" and acts.nnz > 10
    encoder = (module.W_enc.detach(), module.b_enc.detach(), module.theta().detach())
    found = gsf.audit(acts, x, *encoder, tokens=10**6)
    assert found.missed == found.extra == 0 < found.entries, found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "rule",
    [
        {"moments": "8bit"},
        {"betas": (0.9, 0.99)},
        {"betas": (0.3, 0.99), "rows": "live", "remove_parallel": True, "unit_norm": True},
    ],
    ids=str,
)
def test_codes_after_every_step_are_those_of_packing_anew(
    quantised: list[str], fused: bool, dtype: torch.dtype, rule: Any
) -> None:
    center = torch.linspace(-1, 1, D, device=DEVICE)
    module, plain = sae(dtype).screen(center=center), sae(dtype)
    optimizers = [gsf.optim.Adam(m, 1e-2, fused=fused, **rule) for m in (module, plain)]
    losses = [train(m, o, 0) for m, o in zip((module, plain), optimizers, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert_current(module, center)
    for step in range(1, 4):
        train(module, optimizers[0], step)
        assert_current(module, center)
    assert quantised == ["pack", *["moved"] * 4]


def test_latents_that_do_not_move_are_not_quantised() -> None:
    module = sae().screen()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    before = module.W_enc.detach().clone()
    loss_of(module, batch(0)).backward()
    rows = codes_of(module)[-F * D :].view(F, D)
    rows.fill_(77)
    optimizer.step()
    moved = (module.W_enc.detach() != before).any(0)
    assert 0 < int(moved.sum()) < F
    assert_same((rows != 77).any(1), moved)


def test_loss_uses_the_codes(quantised: list[str]) -> None:
    module = sae(threshold=3.0).screen()  # few enough for the sparse path
    for fused in (True, False):
        optimizer = gsf.optim.Adam(module, 1e-2, fused=fused)
        for step in range(2):
            optimizer.zero_grad()
            module.loss(batch(step, 100))[0].backward()
            assert gsf.explain().path == "screened"
            optimizer.step()
        module.deferred = None
        assert_current(module)
    assert quantised == ["pack", *["moved"] * 4]


@pytest.mark.parametrize("activation", [gsf.TopK(8), gsf.BatchTopK(8)], ids=str)
def test_loss_of_a_selection_uses_the_codes(activation: Any) -> None:
    g = torch.Generator(DEVICE).manual_seed(1)
    module = gsf.SAE(D, F, activation, device=DEVICE, dtype=torch.bfloat16, generator=g).screen()
    loss, _ = module.loss(batch(0, 100))
    assert gsf.explain().path == "screened"
    plain, _ = module.unscreen().loss(batch(0, 100))
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)


def test_after_other_changes_all_latents_are_quantised(quantised: list[str]) -> None:
    module = sae().screen()
    train(module, gsf.optim.Adam(module, 1e-2), 0)
    quantised.clear()
    train(module, torch.optim.Adam(module.parameters(), lr=1e-2), 1)
    assert quantised == [], "the codes of before the step were current"
    assert_current(module)
    with torch.no_grad():
        module.W_enc[:, 3] = -2 * module.W_enc[:, 3]
    assert_current(module)
    module.load_state_dict(sae().state_dict())
    assert_current(module)
    assert quantised == ["all"] * 3
    module.float()
    assert_current(module)
    assert quantised == ["all"] * 3 + ["pack"]


def test_check_finds_edits_through_data() -> None:
    module = sae().screen(check=True)
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    train(module, optimizer, 0)
    assert_current(module)
    still = int((optimizer.state[module.W_enc]["touched_at"] == 0).nonzero()[0])
    module.W_enc.data[5, still] += 1
    with pytest.raises(RuntimeError, match=f"weights of 1 latents changed .* being {still};"):
        module.encode(batch(0))


def test_a_step_does_not_wait_for_the_device() -> None:
    module = sae().screen()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    for step in range(3):
        train(module, optimizer, step)
    loss_of(module, batch(3)).backward()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    optimizer.step()
    assert not torch.cuda.current_stream().query(), "the host waited for the update"
    torch.cuda.synchronize()
    assert_current(module)


def test_another_stream_waits_for_the_codes() -> None:
    module, x = sae().screen(), batch(0, 200)
    with torch.no_grad():
        module.encode(x)
        module.W_enc *= 1.5
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        codes_of(module)  # quantised behind the sleep
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            found = module.encode(x)
        side.synchronize()
        expected = module.encode(x)
    assert_same(found.indices, expected.indices)
    assert_same(found.values, expected.values)


def test_a_cuda_graph_gets_the_plain_encoder(quantised: list[str]) -> None:
    module, plain, x = sae().screen(), sae(), batch(0, 64)
    with torch.no_grad():
        expected = plain.encode(x, max_nnz=4000)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            acts = module.encode(x, max_nnz=4000)
        graph.replay()
        torch.cuda.synchronize()
        assert quantised == []
        assert_same(acts.indices, expected.indices)
        assert_same(acts.values, expected.values)
    assert_current(module)


def test_where_nothing_would_use_codes() -> None:
    module, x = sae(d=64).screen(), batch(0, d=64)
    assert module.screened is not None
    assert module.screened.encoder(module.W_enc) is module.W_enc
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    loss_of(module, x).backward()
    optimizer.step()
    assert not module.screened.current(module.W_enc)
