"""Queries of modules against dense computations on their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from oracle import assert_same
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import queries
from gemmascope_fast.multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer

OPS = ("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode", "encode_backward")
KINDS: dict[str, Callable[[], gsf.Activation]] = {
    "jumprelu": lambda: gsf.JumpReLU(bandwidth=0.5, init_threshold=0.3),
    "topk": lambda: gsf.TopK(4),
    "batchtopk": lambda: gsf.BatchTopK(3.5),
}
PRESETS = ("gemma_scope_2", "saelens_6", "dictionary_learning_0_1")


def spread_(module: gsf.SAE | MultiLayer, seed: int = 0) -> None:
    """Random biases, thresholds and rows of any norm, as training leaves them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g).to(p)
            p.add_(noise, alpha=0.05 if name.startswith("threshold") else 0.2)


def sae(kind: str = "jumprelu", semantics: Any = "gemma_scope_2", **options: Any) -> gsf.SAE:
    module = gsf.SAE(8, 40, KINDS[kind](), semantics=semantics, **options)
    spread_(module)
    if module.ema_threshold is not None:
        module.ema_threshold.fill_(0.4)
    return module


def transcoder(**options: Any) -> gsf.Transcoder:
    module = gsf.Transcoder(8, 40, KINDS["jumprelu"](), d_out=6, affine=True, **options)
    spread_(module)
    return module


def layered(kind: type[MultiLayer], packed: bool = True) -> MultiLayer:
    module = kind(3, 8, 20, KINDS["jumprelu"](), packed=packed)
    spread_(module)
    return module


def assert_bits(backend: Backend, ours: Tensor, expected: Tensor) -> None:
    """The same bits where sums have one order, else close."""
    if backend.native:
        assert_same(ours, expected)
    else:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---- encode_latents


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_latents_have_the_bits_of_the_full_encode(
    backend: Backend, kind: str, preset: str, training: bool
) -> None:
    module, x = sae(kind, preset).train(training), torch.randn(3, 5, 8)
    latents = torch.tensor([30, 2, 17, 39, 0, 5, 6, 7, 8])
    running = module.ema_threshold
    before = None if running is None else running.clone()
    found = queries.encode_latents(module, x, latents)
    if running is not None:
        assert before is not None and running == before
    expected = copy.deepcopy(module).encode(x).to_dense()[..., latents]
    assert (expected != 0).sum() > 5
    assert_bits(backend, found, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_chosen_latents_have_the_gradients_of_the_full_encode(
    backend: Backend, preset: str
) -> None:
    module, latents = sae(semantics=preset), [30, 2, 17]
    x = torch.randn(12, 8, requires_grad=True)
    leaves = [x, *(p for name, p in module.named_parameters() if name != "W_dec")]
    seed = torch.randn(12, 3)
    results = (
        queries.encode_latents(module, x, latents),
        module.encode(x).to_dense()[:, latents],
    )
    ours, full = (
        torch.autograd.grad(t, leaves, seed, materialize_grads=True, allow_unused=True)
        for t in results
    )
    for found, expected in zip(ours, full, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(bool(g.any()) for g in (ours[0], ours[1], ours[2], ours[-1]))


@pytest.mark.parametrize("layout", ["fast", "row-major"])
def test_chosen_latents_of_a_frozen_module_in_any_layout(backend: Backend, layout: str) -> None:
    if backend.name == "device":
        pytest.skip("what a CPU packs, a GPU does not take: tests/test_screened_device.py")
    module = gsf.SAE(128, 256, KINDS["jumprelu"]())
    spread_(module)
    if layout == "row-major":
        module.W_enc = torch.nn.Parameter(module.W_enc.detach().contiguous())
    x, latents = torch.randn(40, 128), torch.arange(7, 200, 31)
    expected = module.freeze().encode(x).to_dense()[:, latents]
    assert_bits(backend, queries.encode_latents(module, x, latents), expected)


def test_nan_is_not_hidden(backend: Backend) -> None:
    x = torch.randn(3, 8)
    x[1, 4] = torch.nan
    found = queries.encode_latents(sae(), x, [3, 9])
    assert found[1].isnan().any() and not found[[0, 2]].isnan().any()
    assert queries.top_latents(sae().encode(x), 1).values.isnan().all()


# ---- rows and steering


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_rows_are_what_a_unit_of_activation_adds(kind: str, preset: str) -> None:
    module = sae(kind, preset)
    latents = [4, 9, 4]
    dense = torch.zeros(3, 40)
    dense[range(3), latents] = 1
    ones = gsf.SparseActs.from_dense(dense)
    rows = queries.decoder_rows(module, latents)
    torch.testing.assert_close(rows, module.decode(ones) - module.b_dec)
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[4, 9]] = True
    assert_same(queries.decoder_rows(module, mask), rows[:2])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_encoder_rows_are_gradients_of_activations(kind: str, preset: str) -> None:
    module = sae(kind, preset).eval()
    x = torch.randn(6, 8, requires_grad=True)
    found = queries.top_latents(module.encode(x), 5)
    rows = queries.encoder_rows(module, found.latents)
    for value, token, row in zip(found.values, found.tokens, rows, strict=True):
        (d_x,) = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(row, d_x[token])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_steering_vector_is_what_the_activations_add(preset: str) -> None:
    module = sae("topk", preset)
    acts = gsf.SparseActs.from_dense(torch.zeros(1, 40)).set([7, 30], torch.tensor([2.0, -3.0]))
    expected = (module.decode(acts) - module.b_dec)[0]
    found = queries.steering_vector(module, [7, 30], torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(found, expected)
    assert found.shape == (8,)
    torch.testing.assert_close(
        queries.steering_vector(module, 7, 2.0), 2.0 * queries.decoder_rows(module, 7)[0]
    )


def test_a_steering_vector_in_units_of_the_largest_activation() -> None:
    module, strength = transcoder(), torch.tensor(0.5, requires_grad=True)
    largest = torch.arange(40.0)
    found = queries.steering_vector(module, [3, 10], strength, max_acts=largest)
    expected = 0.5 * (3.0 * module.W_dec[3] + 10.0 * module.W_dec[10])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert strength.grad is not None
    torch.testing.assert_close(strength.grad, 2 * expected.sum().detach())


# ---- cosine_topk


def dense_cosines(rows: Tensor, directions: Tensor) -> Tensor:
    units = torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-30)
    return torch.nn.functional.normalize(directions.double(), dim=-1, eps=1e-30) @ units.t()


@pytest.mark.parametrize("block", [1, 100, 2**23])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cosine_topk(
    monkeypatch: pytest.MonkeyPatch, block: int, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(queries.rows, "BLOCK", block)
    rows, directions = torch.randn(37, 8).to(dtype), torch.randn(*batch, 8)
    truth = dense_cosines(rows, directions)
    for k in (0, 1, 5, 37):
        cosines, indices = queries.cosine_topk(rows, directions, k)
        assert cosines.shape == indices.shape == (*batch, k)
        assert cosines.dtype == torch.promote_types(dtype, torch.float32)
        expected = truth.topk(k)
        assert_same(indices, expected.indices)
        torch.testing.assert_close(cosines.double(), expected.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 20, 2**23])
def test_cosine_topk_of_ties_zero_rows_and_nan(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(queries.rows, "BLOCK", block)
    rows = torch.tensor([[0.0, 0], [0, 3], [4, 0], [-1, 0], [0, 5], [2, 0], [torch.nan, 1]])
    cosines, indices = queries.cosine_topk(rows, torch.tensor([1.0, 0.0]), 7)
    assert indices.tolist() == [6, 2, 5, 0, 1, 4, 3]
    assert_same(cosines, torch.tensor([torch.nan, 1, 1, 0, 0, 0, -1]))
    assert queries.cosine_topk(rows, torch.tensor([1.0, 0.0]), 2)[1].tolist() == [6, 2]
    cosines, indices = queries.cosine_topk(rows[:6], torch.zeros(2), 3)
    assert indices.tolist() == [0, 1, 2] and cosines.tolist() == [0, 0, 0]


def test_cosine_topk_over_encoder_rows() -> None:
    module = sae()
    row = queries.encoder_rows(module, 12)
    assert queries.cosine_topk(module.W_enc.t(), row, 1)[1].tolist() == [[12]]


# ---- fold_decoder_norm


def powers_of_two_(W_dec: Tensor) -> None:
    """Rows of norms that are powers of two, so that folding them rounds nothing."""
    with torch.no_grad():
        W_dec.zero_()
        size = torch.arange(W_dec.shape[0]) % 5 - 2
        W_dec[:, 2] = 2.0**size


@pytest.mark.parametrize("threshold", ["direct", "log"])
@pytest.mark.parametrize("make", [sae, transcoder], ids=["sae", "transcoder"])
def test_folding_norms_that_are_powers_of_two_changes_no_bit(
    backend: Backend, make: Callable[..., gsf.SAE], threshold: str
) -> None:
    semantics = gsf.Semantics(threshold=threshold)
    module, x = make(semantics=semantics), torch.randn(20, 8)
    powers_of_two_(module.W_dec)
    with torch.no_grad():
        norms, theta = module.W_dec.norm(dim=1), module.theta().clone()
        acts, recon = module.encode(x), module(x)
        assert queries.fold_decoder_norm(module) is module
        assert_same(module.W_dec.norm(dim=1), torch.ones(40))
        torch.testing.assert_close(module.theta(), theta * norms)
        folded = module.encode(x)
        assert_same(folded.indices, acts.indices)
        assert_bits(backend, folded.to_dense(), acts.to_dense() * norms)
        assert_bits(backend, module(x), recon)
    assert module.W_dec.requires_grad and module.W_dec.is_leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_folding_any_norms(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(queries.rows, "BLOCK", 30)
    module, x = sae(kind, "saelens_6", dtype=dtype).eval().double(), torch.randn(50, 8).double()
    recon = module(x)
    queries.fold_decoder_norm(module)
    torch.testing.assert_close(module(x), recon, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.W_dec.norm(dim=1), torch.ones(40).double())


def test_folding_leaves_rows_without_a_norm_alone() -> None:
    module = sae()
    with torch.no_grad():
        module.W_dec[3] = 0
        module.W_dec[5] = 1e-9
    before = copy.deepcopy(module)
    queries.fold_decoder_norm(module.freeze())
    assert module.packed is None and module.W_enc.requires_grad
    assert module.threshold is not None and before.threshold is not None
    for j, same in ((3, True), (5, True), (6, False)):
        pairs = (
            (module.W_enc[:, j], before.W_enc[:, j]),
            (module.b_enc[j], before.b_enc[j]),
            (module.threshold[j], before.threshold[j]),
            (module.W_dec[j], before.W_dec[j]),
        )
        assert [bool((new == old).all()) for new, old in pairs] == [same] * 4


@pytest.mark.parametrize("row", [torch.nan, torch.inf])
def test_a_decoder_that_is_not_finite_is_refused_whole(row: float) -> None:
    module = sae()
    with torch.no_grad():
        module.W_dec[33, 1] = row
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="fold_decoder_norm: the norm of decoder row 33 is not"):
        queries.fold_decoder_norm(module)
    for name, t in module.state_dict().items():
        assert_same(t, before[name])


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_folding_what_selects_by_size_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="selects by size"):
        queries.fold_decoder_norm(sae(kind))


# ---- encode_coo


@pytest.mark.parametrize("unique", [False, True], ids=["per entry", "unique"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_coo_reconstructs(kind: str, preset: str, unique: bool) -> None:
    module, x = sae(kind, preset), torch.randn(2, 5, 8, requires_grad=True)
    recon = copy.deepcopy(module)(x)
    coo = queries.encode_coo(module, x, unique=unique)
    tokens = coo.acts.indices()[0] * 5 + coo.acts.indices()[1]
    latents = coo.acts.indices()[2]
    assert coo.row.shape == latents.shape and coo.acts.shape == (2, 5, 40)
    assert len(coo.decoder_rows) == (len(set(latents.tolist())) if unique else len(latents))
    terms = coo.acts.values()[:, None] * coo.decoder_rows[coo.row]
    found = module.b_dec + torch.zeros(10, 8).index_add(0, tokens, terms).reshape(2, 5, 8)
    torch.testing.assert_close(found, recon)
    assert_same(coo.encoder_rows[coo.row], queries.encoder_rows(module, latents))
    ours, expected = (torch.autograd.grad(t.square().sum(), x)[0] for t in (found, recon))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_zero_positions_have_no_entries() -> None:
    module, x = transcoder(), torch.randn(2, 5, 8)
    expected = module.encode(x).to_dense().index_fill(1, torch.tensor([0, 3]), 0.0)
    index = (slice(None), [0, 3])
    found = queries.encode_coo(module, x, zero_positions=index).acts
    assert_same(found.to_dense(), expected)
    assert found.values().shape[0] == int((expected != 0).sum())
    one = queries.encode_coo(module, x[0], zero_positions=slice(0, 1)).acts.to_dense()
    assert not one[0].any() and one[1:].any()


def test_coo_of_one_token_and_of_none() -> None:
    module, x = sae(), torch.randn(8)
    assert_same(queries.encode_coo(module, x).acts.to_dense(), module.encode(x).to_dense())
    empty = queries.encode_coo(module, torch.zeros(0, 5, 8), unique=True)
    assert empty.acts.shape == (0, 5, 40) and empty.decoder_rows.shape == (0, 8)


# ---- modules of several layers


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "full"])
@pytest.mark.parametrize("kind", [Crosscoder, CrossLayerTranscoder])
def test_every_layer_of_several(kind: type[MultiLayer], packed: bool) -> None:
    module, x = layered(kind, packed), torch.randn(4, 3, 8)
    acts, recon = module.encode(x), module(x)
    total = module.b_dec.expand(4, 3, 8)
    for layer in range(3):
        part = x[:, layer]
        found = queries.encode_latents(module, part, [3, 1], layer=layer)
        torch.testing.assert_close(found, acts[layer].to_dense()[:, [3, 1]])
        coo = queries.encode_coo(module, part, layer=layer)
        token, latents = coo.acts.indices()
        torch.testing.assert_close(coo.encoder_rows, module.W_enc[layer].t()[latents])
        assert coo.decoder_rows.shape[1:] == (len(module.outputs(layer)), 8)
        for j, value in zip(latents.tolist(), coo.acts.values(), strict=True):
            vector = queries.steering_vector(module, j, value, layer=layer)
            assert vector.shape == (3, 8)
            total = total.index_add(0, token[:1], vector[None])
            token = token[1:]
    torch.testing.assert_close(total, recon, rtol=1e-4, atol=1e-4)


def test_codes_of_a_frozen_layer_serve_its_own_weights_only() -> None:
    module, x = layered(Crosscoder).freeze(), torch.randn(4, 8)
    expected = module.encode_layer(1, x).to_dense()
    assert_same(queries.encode_coo(module, x, layer=1).acts.to_dense(), expected)
    module.W_enc[1] = torch.nn.Parameter(-module.W_enc[1].detach(), requires_grad=False)
    found = queries.encode_coo(module, x, layer=1).acts.to_dense()
    torch.testing.assert_close(found, module.unfreeze().encode_layer(1, x).to_dense())
    assert not found.equal(expected)


@pytest.mark.parametrize("kind", [Crosscoder, CrossLayerTranscoder])
def test_folding_several_layers(kind: type[MultiLayer]) -> None:
    module = layered(kind).double()
    x = torch.randn(4, 3, 8).double()
    acts, recon = module.encode(x), module(x)
    norms = [W.detach().norm(dim=1) for W in module.W_dec]
    queries.fold_decoder_norm(module)
    torch.testing.assert_close(module(x), recon)
    for W_dec, before, after, r in zip(module.W_dec, acts, module.encode(x), norms, strict=True):
        torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(20).double())
        torch.testing.assert_close(after.to_dense(), before.to_dense() * r)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: queries.encode_latents(None, torch.ones(2, 8), 0), TypeError, "module must be"),
        (lambda m: queries.encode_latents(m, torch.ones(2, 9), 0), ValueError, "encode_latents: x"),
        (lambda m: queries.encode_latents(m, torch.ones(2, 8), 40), ValueError, "latent 40"),
        (lambda m: queries.encode_latents(m, torch.ones(2, 8), [1, 1]), ValueError, "distinct"),
        (
            lambda m: queries.encode_latents(m, torch.ones(2, 8), 0, layer=0),
            ValueError,
            "encode_latents: layer is for modules of several layers",
        ),
        (lambda m: queries.encode_coo(m, torch.ones(2, 9)), ValueError, "encode_coo: x must"),
        (lambda m: queries.encode_coo(3, torch.ones(2, 8)), TypeError, "encode_coo: module must"),
        (lambda m: queries.decoder_rows(m, [-1]), ValueError, "decoder_rows: latent -1"),
        (lambda m: queries.encoder_rows(m, [0.5]), TypeError, "encoder_rows: latents must be int"),
        (lambda m: queries.steering_vector(m, [3, 3]), ValueError, "distinct"),
        (
            lambda m: queries.steering_vector(m, [3, 4], torch.ones(3)),
            ValueError,
            r"steering_vector: strength must be a number or have shape \[m=2\]",
        ),
        (
            lambda m: queries.steering_vector(m, 3, max_acts=torch.ones(39)),
            ValueError,
            r"steering_vector: max_acts must have shape \[40\]",
        ),
        (lambda m: queries.fold_decoder_norm(None), TypeError, "fold_decoder_norm: module must"),
        (
            lambda m: queries.cosine_topk(m.W_dec, torch.ones(9), 1),
            ValueError,
            r"cosine_topk: directions must have shape \[\*batch, d=8\]",
        ),
        (lambda m: queries.cosine_topk(m.b_dec, torch.ones(8), 1), ValueError, "rows must have"),
        (lambda m: queries.cosine_topk(m.W_dec, torch.ones(8), 41), ValueError, "d_sae=40"),
        (lambda m: queries.cosine_topk(m.W_dec, [1.0] * 8, 1), TypeError, "directions must be"),
        (
            lambda m: queries.decoder_rows(layered(Crosscoder), 0),
            ValueError,
            "decoder_rows: Crosscoder has 3 layers: pass layer",
        ),
        (
            lambda m: queries.decoder_rows(layered(Crosscoder), 0, layer=3),
            ValueError,
            r"layer must be in \[0, n_layers - 1=2\], got 3",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(sae())
