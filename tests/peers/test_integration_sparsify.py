"""sparsify's coders with this library's ops in their place, beside sparsify's own.

`strict_compat=True` has sparsify's gradients; without it they are those of its forward pass under
plain autograd, which `plainly` puts in place of its encoder.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peer
import pytest
import torch
from peer import DEAD, D, F, batch, close
from torch import Tensor, nn

from gemmascope_fast.integrations import sparsify as gsf_sparsify
from gemmascope_fast.integrations.sparsify_pre_acts import PreActs

host = pytest.importorskip("sparsify", reason="eai-sparsify is not installed: see `make peers`")
sparse_coder = importlib.import_module("sparsify.sparse_coder")
fused = importlib.import_module("sparsify.fused_encoder")
utils = importlib.import_module("sparsify.utils")
STOCK = (fused.fused_encoder, utils.decoder_impl, vars(host.SparseCoder)[gsf_sparsify.PROJECTION])

VARIANTS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "multi_topk": {"multi_topk": True},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "centred_skip": {"skip_connection": True},
    "all_zeros_selected": {"k": F},
}
MASKS = {"none": None, **DEAD, "nobody": torch.zeros(F, dtype=torch.bool)}


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    gsf_sparsify.uninstall()
    assert (sparse_coder.fused_encoder, sparse_coder.decoder_impl) == STOCK[:2]


def coder(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    made = host.SparseCoder(D, host.SparseCoderConfig(**{"num_latents": F, "k": 5, **options}))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return made


@contextmanager
def plainly() -> Iterator[None]:
    """sparsify's forward pass, under autograd's own derivatives."""

    def encode(x: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str) -> Any:
        pre = nn.functional.linear(x, weight, bias).relu()
        return fused.EncoderOutput(*pre.topk(k, sorted=False), pre)

    sparse_coder.fused_encoder = encode
    try:
        yield
    finally:
        sparse_coder.fused_encoder = STOCK[0]


def outcome(made: Any, mask: Tensor | None) -> tuple[Any, dict[str, Tensor]]:
    """All outputs, and all gradients of the loss of sparsify's trainer."""
    x = batch(0).requires_grad_()
    y = batch(3) * 2 if made.cfg.transcode else None
    out = made(x, y, dead_mask=mask)
    loss = out.fvu + 0.5 * out.auxk_loss + out.multi_topk_fvu / 8
    named = {"x": x, **dict(made.named_parameters())}
    found = torch.autograd.grad(loss, list(named.values()))
    return out, dict(zip(named, found, strict=True))


def same(found: tuple[Any, dict[str, Tensor]], expected: tuple[Any, dict[str, Tensor]]) -> None:
    for field in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        close(getattr(found[0], field), getattr(expected[0], field), field)
    (values, latents), (wanted, at) = (
        (t.latent_acts.sort(descending=True), t.latent_indices) for t in (found[0], expected[0])
    )
    close(values[0], wanted[0], "latent_acts")
    active = wanted[0] > 0
    assert torch.equal(latents.gather(1, values[1])[active], at.gather(1, wanted[1])[active])
    assert latents.dtype == torch.int64
    for name, gradient in expected[1].items():
        close(found[1][name], gradient, name)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(variant: str, mask: str, strict: bool) -> None:
    made = coder(**VARIANTS[variant])
    if strict:
        expected = outcome(made, MASKS[mask])
    else:
        with plainly():
            expected = outcome(made, MASKS[mask])
    with gsf_sparsify.install(strict_compat=strict):
        same(outcome(made, MASKS[mask]), expected)
    with gsf_sparsify.accelerate(made, strict_compat=strict):
        same(outcome(made, MASKS[mask]), expected)


def test_top_entries_come_in_sparsifys_order() -> None:
    """Of few out of many latents: `torch.topk(sorted=False)` sorts them on a CPU."""
    made = coder(num_latents=2048, k=8, multi_topk=True)
    for mask in (None, torch.arange(2048) % 2 == 0):
        expected = made(batch(0), dead_mask=mask)
        with gsf_sparsify.install():
            found = made(batch(0), dead_mask=mask)
        assert torch.equal(found.latent_indices, expected.latent_indices)
        close(found.latent_acts, expected.latent_acts, "latent_acts")


@pytest.mark.parametrize("variant", ["multi_topk", "all_zeros_selected"])
def test_the_known_differences_are_there(variant: str) -> None:
    made = coder(**VARIANTS[variant])
    expected = outcome(made, DEAD["many"])[1]
    with gsf_sparsify.install():
        found = outcome(made, DEAD["many"])[1]
    assert peer.differs(found["encoder.weight"], expected["encoder.weight"])


def test_no_pre_activations_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PreActs) -> Tensor:
        raise AssertionError("dense")

    monkeypatch.setattr(PreActs, "dense", refuse)
    with gsf_sparsify.install():
        outcome(coder(multi_topk=True), DEAD["many"])
        with pytest.raises(AssertionError, match="dense"):
            coder().encode(batch(0)).pre_acts.sum()


def test_groupmax_stays_its_own() -> None:
    made = coder(activation="groupmax", k=6)
    expected = outcome(made, DEAD["many"])
    with gsf_sparsify.install():
        assert not isinstance(made.encode(batch(0)).pre_acts, PreActs)
        same(outcome(made, DEAD["many"]), expected)


def test_autocast_as_sparsify_has_it() -> None:
    """Values in bfloat16, decoding and gradients in float32."""
    made = coder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = made.encode(batch(0))
        with gsf_sparsify.install(strict_compat=True):
            found = made.encode(batch(0))
            out, gradients = outcome(made, DEAD["many"])
            inside = made.decode(found.top_acts, found.top_indices)
        plain, wanted = outcome(made, DEAD["many"])
    assert found.top_acts.dtype == expected.top_acts.dtype == torch.bfloat16
    assert found.pre_acts.dtype == expected.pre_acts.dtype
    close(inside, made.decode(found.top_acts, found.top_indices), "decoded in float32")
    agree = (found.top_indices[:, :, None] == expected.top_indices[:, None]).any(2)
    assert agree.float().mean() > 0.9  # bfloat16 ties and near ties
    ordered = expected.top_acts.sort(descending=True)[0]
    torch.testing.assert_close(found.top_acts, ordered, rtol=2**-6, atol=0.02)
    assert out.sae_out.dtype == plain.sae_out.dtype == torch.float32
    torch.testing.assert_close(out.fvu, plain.fvu, rtol=0.02, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        off = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert off < 0.1, name


def test_bfloat16_coder_and_other_shapes() -> None:
    made = coder().bfloat16()
    x = batch(0).bfloat16()
    expected = made(x)
    with gsf_sparsify.install():
        found = made(x)
        assert found.latent_acts.dtype == found.sae_out.dtype == torch.bfloat16
        torch.testing.assert_close(found.fvu, expected.fvu, rtol=0.02, atol=0)
        assert coder()(batch(0).double().float()[:0]).sae_out.shape == (0, D)
        values, latents, _ = coder().encode(batch(0).reshape(8, 5, D))
        assert values.shape == latents.shape == (8, 5, 5)
        whole = coder()(batch(0)).sae_out
        close(coder().decode(values, latents), whole.reshape(8, 5, D), "3-D")


def test_200_steps_of_training() -> None:
    """One seed, AuxK, its projections: the losses agree step by step."""
    directions = torch.randn(2 * D, D, generator=torch.Generator().manual_seed(1))

    def data(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        codes = torch.rand(64, 2 * D, generator=generator)
        return (codes * (codes > 0.9)) @ directions

    def train() -> tuple[list[float], float, Tensor]:
        torch.manual_seed(0)
        made = host.SparseCoder(D, host.SparseCoderConfig(num_latents=F, k=5))
        optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
        idle, seen = torch.zeros(F, dtype=torch.int64), []
        for step in range(200):
            made.set_decoder_norm_to_unit_norm()
            out = made(data(step), dead_mask=idle > 320)
            (out.fvu + out.auxk_loss / 32).backward()
            made.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            idle += 64
            idle[out.latent_indices.flatten()] = 0
            seen.append(float(out.fvu.detach() + out.auxk_loss.detach() / 32))
        out = made(data(1000))
        return seen, float((out.latent_acts > 0).float().sum(1).mean()), out.fvu.detach()

    expected, l0, fvu = train()
    with gsf_sparsify.install(strict_compat=True):
        found, our_l0, our_fvu = train()
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=0)
    assert abs(our_l0 / l0 - 1) < 0.01
    assert abs(float(our_fvu / fvu) - 1) < 0.01


def test_gradient_projection_is_sparsifys() -> None:
    made, twin = coder(), coder()
    for one in (made, twin):
        one.W_dec.grad = torch.randn(F, D, generator=torch.Generator().manual_seed(2))
        one.W_dec.grad[::3] = 0
    twin.remove_gradient_parallel_to_decoder_directions()
    with gsf_sparsify.install():
        made.remove_gradient_parallel_to_decoder_directions()
    close(made.W_dec.grad, twin.W_dec.grad, "projected")


def names() -> tuple[Any, ...]:
    stands = vars(host.SparseCoder)[gsf_sparsify.PROJECTION]
    assert sparse_coder.fused_encoder is fused.fused_encoder
    assert sparse_coder.decoder_impl is utils.decoder_impl
    return fused.fused_encoder, utils.decoder_impl, stands


def test_uninstall_restores_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those taken by modules that were imported while it was installed, too."""
    gsf_sparsify.install()
    assert names() == tuple(gsf_sparsify.OURS.values())
    late = types.ModuleType("sparsify.late")
    late.under_another_name = utils.decoder_impl  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparsify.late", late)
    theirs = utils.decoder_impl  # a user's, outside the package
    gsf_sparsify.uninstall()
    assert names() == STOCK
    assert late.under_another_name is STOCK[1]  # type: ignore[attr-defined]
    made = coder()
    values, latents, _ = made.encode(batch(0))
    assert torch.equal(
        theirs(latents, values, made.W_dec.mT), STOCK[1](latents, values, made.W_dec.mT)
    )
    gsf_sparsify.uninstall()


def test_contexts_nest_and_end_with_an_error() -> None:
    one, other = coder(), coder()
    with pytest.raises(KeyError), gsf_sparsify.accelerate(one):
        assert isinstance(one.encode(batch(0)).pre_acts, PreActs)
        assert not isinstance(other.encode(batch(0)).pre_acts, PreActs)
        with gsf_sparsify.install(strict_compat=True):
            assert other.encode(batch(0)).pre_acts.strict
            assert not one.encode(batch(0)).pre_acts.strict
            with gsf_sparsify.install():
                assert not other.encode(batch(0)).pre_acts.strict
            assert other.encode(batch(0)).pre_acts.strict
        assert not isinstance(other.encode(batch(0)).pre_acts, PreActs)
        assert isinstance(one.encode(batch(0)).pre_acts, PreActs)
        raise KeyError
    assert names() == STOCK


def test_accelerated_coder_may_be_converted_and_saved(tmp_path: Any) -> None:
    made = coder()
    with gsf_sparsify.accelerate(made):
        made.to(torch.float64)
        assert isinstance(made.encode(batch(0).double()).pre_acts, PreActs)
        made.float().save_to_disk(tmp_path)
        assert set(made.state_dict()) == set(coder().state_dict())
    again = host.SparseCoder.load_from_disk(tmp_path)
    close(again(batch(0)).sae_out, made(batch(0)).sae_out, "saved")


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="accelerate: coder must be a sparsify.SparseCoder, got"):
        gsf_sparsify.accelerate(nn.Linear(2, 3))
    assert names() == STOCK
    with gsf_sparsify.install():
        with pytest.raises(ValueError, match=r"fused_encoder: k must be in \[0, d_sae=96\]"):
            coder(k=F + 1).encode(batch(0))
        with pytest.raises(ValueError, match="fused_encoder: x must"):
            coder(transcode=True).encode(torch.zeros(3, D + 1))
        with pytest.raises(ValueError, match="top_indices and top_acts must have the same shape"):
            coder().decode(torch.zeros(3, 2), torch.zeros(3, 3, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="97"):
            coder().decode(torch.zeros(3, 2), torch.full((3, 2), 97))
