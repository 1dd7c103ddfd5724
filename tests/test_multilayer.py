"""Crosscoder and CrossLayerTranscoder: values and gradients against dense matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import native_absent
from oracle import assert_close_to_truth, assert_same
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import gemmascope_fast as gsf
from gemmascope_fast import BatchTopK, Crosscoder, CrossLayerTranscoder, JumpReLU, SparseActs, TopK
from gemmascope_fast.multilayer import MultiLayer

OPS = (
    *("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode_"),
    *("encode_backward", "decode_backward", "by_feature"),
)
L, D, F = 3, 20, 37
JUMP = JumpReLU(bandwidth=0.5, init_threshold=0.2)
PACKINGS: list[Any] = [True, False, [True, False, True]]
KINDS = {
    "crosscoder": Crosscoder,
    "clt": CrossLayerTranscoder,
    "affine clt": lambda *args, **options: CrossLayerTranscoder(*args, affine=True, **options),
}


def build(kind: str, activation: Any = JUMP, layers: int = L, **options: Any) -> MultiLayer:
    """A module whose every parameter is random, the blocks above the triangle included."""
    module: MultiLayer = KINDS[kind](layers, D, F, activation, **options)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * 0.2)
    return module


def dense(module: MultiLayer, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Recon `[n, L, D]` and L0 `[n, L]` by the formulas, with straight-through thresholds."""
    layers, recon, l0 = x.shape[1], list(p["b_dec"]), []
    for i in range(layers):
        pre = x[:, i] @ p[f"W_enc.{i}"] + p[f"b_enc.{i}"]
        if isinstance(module.activation, JumpReLU):
            theta, width = p[f"threshold.{i}"], module.activation.bandwidth
            on = (pre > theta).to(pre.dtype)
            step = ((pre - theta).abs() < width / 2) * (theta.detach() - theta) / width
            acts, gate = pre * on + theta.detach() * step, on + step
        else:
            k = module.activation.k
            parts = pre.relu() if isinstance(module.activation, TopK) else pre.relu().view(1, -1)
            count = k if isinstance(module.activation, TopK) else int(k * len(x))
            acts = (parts * (parts >= parts.topk(count).values[:, -1:])).view_as(pre)
            gate = (acts > 0).to(pre.dtype)
        W_dec = p[f"W_dec.{i}"].view(F, -1, D)
        for j in range(layers - W_dec.shape[1], layers):
            recon[j] = recon[j] + acts @ W_dec[:, j - layers]
        if f"W_skip.{i}" in p:
            recon[i] = recon[i] + x[:, i] @ p[f"W_skip.{i}"]
        l0.append(gate.sum(1))
    return torch.stack(recon, 1), torch.stack(l0, 1)


def parameters(module: MultiLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: p.detach().to(dtype).requires_grad_(p.requires_grad)
        for name, p in module.named_parameters()
    }


def assert_dense(module: MultiLayer, x: Tensor, terms: Callable[..., Tensor]) -> None:
    """Value and every gradient of `terms(recon, l0)` are those of dense float64 autograd."""
    found = []
    for dtype in (torch.float32, torch.float64):
        p, input_ = parameters(module, dtype), x.detach().to(dtype).requires_grad_()
        recon, l0 = dense(module, p, input_.view(-1, *x.shape[-2:]))
        wanted = [input_, *(t for t in p.values() if t.requires_grad)]
        grads = torch.autograd.grad(terms(recon, l0), wanted)
        found.append([recon.view(*x.shape), l0.view(x.shape[:-1]), *grads])
    x = x.detach().requires_grad_()
    acts = module.encode(x)
    given = (acts, x) if isinstance(module, CrossLayerTranscoder) else (acts,)
    recon = module.decode(*given, dtype=module.b_dec.dtype)
    l0 = module.l0(acts)
    flat = recon.view(-1, *x.shape[-2:]), l0.view(-1, x.shape[-2])
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(terms(*flat), [x, *trained.values()])
    for grad, p in zip(grads[1:], trained.values(), strict=True):
        assert grad.dtype == p.dtype and grad.stride() == p.stride()
    names = ["recon", "l0", "x", *trained]
    for name, ours, theirs, truth in zip(names, [recon, l0, *grads], *found, strict=True):
        assert_close_to_truth(ours, theirs, truth, ours.dtype, name, terms=len(x) * L * 4)


def loss_terms() -> Callable[[Tensor, Tensor], Tensor]:
    """A loss in which every output and every layer's L0 counts differently."""
    g = torch.Generator().manual_seed(5)

    def terms(recon: Tensor, l0: Tensor) -> Tensor:
        g.manual_seed(5)
        target = torch.randn(recon.shape, generator=g).to(recon.dtype)
        weight = torch.rand(l0.shape, generator=g).to(l0.dtype)
        return (recon - target).square().sum() + (weight * l0).sum()

    return terms


# ---- values and gradients


@pytest.mark.parametrize("packed", PACKINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_dense(backend: Any, kind: str, packed: Any) -> None:
    assert_dense(build(kind, packed=packed), torch.randn(4, 3, L, D), loss_terms())


@pytest.mark.parametrize("activation", [TopK(4), BatchTopK(3.5)], ids=lambda a: type(a).__name__)
def test_selections_are_made_inside_each_layer(backend: Any, activation: Any) -> None:
    module = build("crosscoder", activation)
    assert module.threshold is None
    assert_dense(module, torch.randn(12, L, D), lambda recon, l0: recon.square().sum())
    acts = module.encode(torch.randn(10, L, D))
    assert [int(a.gate.sum()) for a in acts] == [int(activation.k * 10)] * L


def test_one_layer_is_an_sae(backend: Any) -> None:
    module, sae = build("crosscoder", layers=1), gsf.SAE(D, F, JUMP)
    sae.load_state_dict(
        {n.removesuffix(".0"): p for n, p in module.state_dict().items()}
        | {"b_dec": module.b_dec[0]}
    )
    x = torch.randn(9, D)
    (acts,), expected = module.encode(x[:, None]), sae.encode(x)
    for name in ("offsets", "indices", "values", "gate"):
        assert_same(getattr(acts, name).detach(), getattr(expected, name).detach())
    torch.testing.assert_close(module(x[:, None])[:, 0], sae(x), rtol=1e-6, atol=1e-6)
    assert_dense(module, x[:, None], loss_terms())


def test_packing_changes_no_bit(backend: Any) -> None:
    packed, full = build("clt"), build("clt", packed=False)
    with torch.no_grad():
        for name, p in packed.named_parameters():
            other = dict(full.named_parameters())[name]
            other.zero_()[..., other.shape[-1] - p.shape[-1] :] = p
    x = torch.randn(8, L, D)
    assert_same(packed(x).detach(), full(x).detach())
    for module in (packed, full):
        module(x).square().sum().backward()
    for i in range(L):
        assert_same(full.W_dec[i].grad[:, i * D :], packed.W_dec[i].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_sees_a_later_layer(backend: Any, kind: str) -> None:
    module, x = build(kind), torch.randn(6, L, D, requires_grad=True)
    for j in range(L):
        (d_x,) = torch.autograd.grad(module(x)[:, j].sum(), x)
        assert bool(d_x[:, : j + 1].any()) and not d_x[:, j + 1 :].any()
    (d_x,) = torch.autograd.grad(build(kind, packed=False)(x)[:, 0].sum(), x)
    assert bool(d_x[:, 1:].any())


def test_effects_of_single_activations_are_decoder_rows(backend: Any) -> None:
    """Attribution: d recon_j / d acts_i by leaves, for entries that were not active too."""
    module, x = build("clt").requires_grad_(False), torch.randn(5, L, D)
    direction, target = torch.randn(D), 2
    acts = module.encode(x)
    other = module.encode(torch.randn(5, L, D))
    leaves = [a.union(b).detach().requires_grad_() for a, b in zip(acts, other, strict=True)]
    (module.decode(leaves)[:, target] @ direction).sum().backward()
    for i, leaf in enumerate(leaves):
        rows = module.decoder(i)[:, target - module.outputs(i).start]
        expected = (rows @ direction)[leaf.indices.long()]
        assert leaf.nnz > acts[i].nnz > 0
        torch.testing.assert_close(leaf.values.grad, expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_raise(backend: Any) -> None:
    module, x = build("crosscoder"), torch.randn(4, L, D, requires_grad=True)
    (d_x,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of sparse .* not supported"):
        d_x.sum().backward()


# ---- special batches


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_active(backend: Any, kind: str) -> None:
    module, x = build(kind), torch.randn(4, L, D)
    with torch.no_grad():
        for theta in module.threshold:
            theta.fill_(1e6)
    acts = module.encode(x)
    assert [a.nnz for a in acts] == [0] * L and not module.l0(acts).any()
    expected = module.b_dec.expand(4, L, D).double()
    if getattr(module, "W_skip", None) is not None:
        expected = expected + torch.einsum("nld,lde->nle", x, torch.stack(list(module.W_skip)))
    recon = module(x)
    torch.testing.assert_close(recon, expected.float(), rtol=1e-5, atol=1e-5)
    recon.sum().backward()
    assert_same(module.b_dec.grad, torch.full((L, D), 4.0))
    for name in ("W_enc", "b_enc", "W_dec", "threshold"):
        for p in getattr(module, name):
            assert_same(p.grad, torch.zeros_like(p))


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_batches_of_any_shape(backend: Any, shape: tuple[int, ...]) -> None:
    module, x = build("affine clt"), torch.randn(*shape, L, D)
    recon, acts = module(x), module.encode(x)
    assert recon.shape == x.shape and [a.shape for a in acts] == [(*shape, F)] * L
    assert module.l0(acts).shape == (*shape, L)
    recon.sum().backward()
    count = float(x[..., 0, 0].numel())
    assert_same(module.b_dec.grad, torch.full((L, D), count))
    if count:
        assert_same(recon.detach(), module(x[None])[0].detach())
    else:
        assert not any(bool(p.grad.any()) for p in module.parameters())


def test_layers_of_x_need_not_be_adjacent(backend: Any) -> None:
    module, x = build("affine clt"), torch.randn(2, 5, L, D)
    apart = torch.full((2, 5, 2 * L, D + 3), torch.nan)[:, :, ::2, 2:-1].copy_(x)
    by_layer = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wanted, d_out = module(x), torch.randn(2, 5, L, D)
    grads = torch.autograd.grad(wanted, list(module.parameters()), d_out)
    d_apart = torch.full((2, 5, L + 1, 2 * D), torch.nan)[:, :, 1:, ::2].copy_(d_out)
    for layout in (apart, by_layer):
        recon = module(layout)
        torch.testing.assert_close(recon, wanted, rtol=1e-6, atol=1e-6)
        found = torch.autograd.grad(recon, list(module.parameters()), d_apart)
        for ours, expected in zip(found, grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_summed_in_float32(backend: Any, dtype: torch.dtype) -> None:
    """Sources are added in float32 and rounded once: 16 layers leave one rounding."""
    module = build("crosscoder", layers=16, dtype=dtype).requires_grad_(False)
    x = torch.randn(6, 16, D)
    recon = module.decode(module.encode(x))
    assert recon.dtype == dtype and module(x).dtype == torch.float32
    truth, _ = dense(module, parameters(module, torch.float64), x.double())
    assert_close_to_truth(recon, truth.to(dtype), truth, dtype, terms=D * F)
    assert_same(module(x), module.decode(module.encode(x), dtype=torch.float32))
    assert build("affine clt", dtype=dtype)(x[:, :L]).dtype == torch.float32


def test_gradients_of_low_precision_weights(backend: Any) -> None:
    assert_dense(build("clt", dtype=torch.bfloat16), torch.randn(7, L, D), loss_terms())


def test_float64_is_exact(backend: Any) -> None:
    module, x = build("affine clt", dtype=torch.float64), torch.randn(5, L, D).double()
    assert module.b_dec.dtype == module.threshold[0].dtype == torch.float64
    expected, _ = dense(module, parameters(module, torch.float64), x)
    assert module(x).dtype == torch.float64
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_autocast_casts_x_and_matrices_only(backend: Any) -> None:
    module, x = build("clt"), torch.randn(6, L, D)
    low = copy.deepcopy(module).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        acts, recon = module.encode(x), module(x)
        recon.square().sum().backward()
    expected = low.encode(x.bfloat16())
    for ours, theirs in zip(acts, expected, strict=True):
        assert_same(ours.values.detach(), theirs.values.detach())
    assert_same(recon.detach(), low.decode(expected, dtype=torch.float32).detach())
    low.decode(expected, dtype=torch.float32).square().sum().backward()
    for (name, p), other in zip(module.named_parameters(), low.parameters(), strict=True):
        assert_same(p.grad, other.grad.float(), name)


# ---- memory


def allocations(run: Callable[[], None]) -> tuple[int, int]:
    """Bytes that torch's allocator hands out for `run`, the insides of ops included: peak, sum."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, total = max(peak, live), total + max(event.nbytes(), 0)
    assert peak > 0
    return peak, total


LAYERS, N, WIDTH, K = 12, 400, 64, 2
ENTRIES = LAYERS * N * K * 4 * 12  # bytes: values, gradients, tokens and orders of the entries


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("expanded", [True, False])
def test_decoding_makes_one_reconstruction_and_no_copy_per_source(
    trained: bool, expanded: bool
) -> None:
    """Both directions work on the columns that a source reaches where they are."""
    if reason := native_absent(OPS):
        pytest.skip(f"the reference is dense inside; {reason}")
    module = CrossLayerTranscoder(LAYERS, WIDTH, 60, TopK(K)).requires_grad_(trained)
    stack = torch.randn(N, LAYERS, WIDTH)
    acts = [a.detach().requires_grad_() for a in module.encode(stack)]
    d_recon = torch.ones(()).expand_as(stack) if expanded else stack
    gradients = sum(p.nbytes for p in module.W_dec) if trained else 0
    _, total = allocations(lambda: module.decode(acts).backward(d_recon))
    stacks = 2 if expanded else 1
    assert stack.nbytes < total <= stacks * stack.nbytes + ENTRIES + 1.1 * gradients


def test_memory_of_a_step_is_linear_in_stack_and_entries() -> None:
    if reason := native_absent(OPS):
        pytest.skip(f"the reference is dense inside; {reason}")
    module = CrossLayerTranscoder(LAYERS, WIDTH, 60, TopK(K), affine=True)
    x = torch.randn(N, LAYERS, WIDTH)
    gradients = sum(p.nbytes for p in module.parameters())
    peak, _ = allocations(lambda: module(x).backward(x))
    assert peak <= 4 * x.nbytes + ENTRIES + 1.1 * gradients


def test_encoding_copies_no_layer() -> None:
    if reason := native_absent(OPS):
        pytest.skip(f"the reference is dense inside; {reason}")
    module, x = Crosscoder(LAYERS, WIDTH, 60, TopK(K)), torch.randn(N, LAYERS, WIDTH)

    def run() -> None:
        torch.stack([a.values.sum() for a in module.encode(x)]).sum().backward()

    gradients = sum(p.nbytes for p in (*module.W_enc, *module.b_enc))
    _, total = allocations(run)
    assert total <= 1.1 * gradients + ENTRIES < 1.1 * gradients + x.nbytes


# ---- multi_decode


def test_multi_decode_of_narrow_sources(backend: Any) -> None:
    """Sources of any number of outputs, bf16 beside float32, an added skip."""
    acts = [SparseActs.from_dense(torch.randn(4, f).relu()) for f in (5, 7, 6)]
    W_dec = [torch.randn(5, 12), torch.randn(7, 4).bfloat16(), torch.randn(6, 8)]
    b_dec, skip = torch.randn(3, 4), torch.randn(4, 3, 4)
    padded = [torch.nn.functional.pad(W.float(), (12 - W.shape[1], 0)) for W in W_dec]
    total = sum(a.to_dense() @ W for a, W in zip(acts, padded, strict=True))
    expected = b_dec + skip + total.view(4, 3, 4)
    found = gsf.multi_decode(acts, W_dec, b_dec, skip=skip)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    low = gsf.multi_decode(acts, W_dec, b_dec, skip=skip, dtype=torch.bfloat16)
    assert_same(low, found.bfloat16())
