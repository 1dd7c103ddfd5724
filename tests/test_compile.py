"""torch.compile, torch.export and activation checkpointing give what eager gives."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same
from samples import Problem, problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gemmascope_fast as gsf
from gemmascope_fast import SparseActs

CAPACITY = 2000
KINDS = ["jumprelu", "topk", "batchtopk"]


def encode(kind: str, p: Problem, x: Tensor, max_nnz: int | None) -> SparseActs:
    encoder = x, p.W_enc, p.b_enc
    if kind == "jumprelu":
        return gsf.jumprelu_encode(*encoder, p.threshold, bandwidth=0.4, max_nnz=max_nnz)
    if kind == "topk":
        return gsf.topk_encode(*encoder, 5)
    return gsf.batchtopk_encode(*encoder, 4.5, max_nnz=max_nnz)


def loss_of(kind: str, p: Problem, max_nnz: int | None) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        acts = encode(kind, p, x, max_nnz)
        recon = gsf.decode(acts, p.W_dec, p.b_dec)
        return (recon - 1).square().mean() + 0.1 * acts.l0().mean() + acts.values.abs().sum()

    return loss


def gradients(kind: str, p: Problem, loss: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The loss, then the gradients of x and of every parameter."""
    leaves = [x.requires_grad_(), p.W_enc, p.b_enc, p.W_dec, p.b_dec]
    leaves += [p.threshold] if kind == "jumprelu" else []
    value = loss(x)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_compiled_equals_eager(kind: str, max_nnz: int | None, backend: str) -> None:
    """One graph, compiled once, for every number of tokens; the sums of a loss may be fused."""
    p = problem().leaves()
    loss = loss_of(kind, p, max_nnz)
    options = {"capture_dynamic_output_shape_ops": max_nnz is None, "error_on_recompile": True}
    with torch._dynamo.config.patch(options):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
        for n in (13, 29, 5):
            x = torch.randn(n, 23)
            found = gradients(kind, p, compiled, x.clone())
            expected = gradients(kind, p, loss, x.clone())
            for ours, theirs in zip(found, expected, strict=True):
                if backend == "aot_eager":
                    assert_same(ours, theirs)
                assert bool(theirs.any())
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_capacity_compiles_to_one_graph(kind: str) -> None:
    assert_compiled_equals_eager(kind, CAPACITY, "aot_eager")


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_the_exactly_sized_form_compiles_too(kind: str) -> None:
    assert_compiled_equals_eager(kind, None, "aot_eager")


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_batchtopk_that_trains_compiles_to_one_graph(decay: float | None) -> None:
    """Its running threshold moves inside the graph."""
    semantics = gsf.Semantics(ema_decay=decay)
    made = [gsf.SAE(23, 37, gsf.BatchTopK(4.5), semantics=semantics) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(made[1], fullgraph=True, backend="aot_eager")
        for _ in range(3):
            x = torch.randn(13, 23)
            assert_same(compiled(x).detach(), made[0](x).detach())
    made[1].load_state_dict(made[1].state_dict())
    assert (made[0].ema_threshold is None) == (decay is None)
    for name, t in made[0].named_buffers():
        assert float(t) > 0 and torch.equal(t, made[1].get_buffer(name))


def test_inductor_compiles_a_step() -> None:
    assert_compiled_equals_eager("jumprelu", CAPACITY, "inductor")


def test_compiled_functions_return_and_take_activations() -> None:
    p = problem()
    run = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    encoder = torch.compile(lambda x: encode("jumprelu", p, x, CAPACITY), **run)
    decoder = torch.compile(lambda acts: gsf.decode(acts, p.W_dec, p.b_dec), **run)
    for shape in ((13, 23), (3, 4, 23)):
        x = torch.randn(shape)
        acts, expected = encoder(x), encode("jumprelu", p, x, CAPACITY)
        assert acts.shape == expected.shape and acts.padded
        assert_same(acts.values, expected.values)
        assert_same(acts.check().to_dense(), expected.to_dense())
        assert_same(decoder(acts), gsf.decode(expected, p.W_dec, p.b_dec))


def test_the_first_thing_a_process_does_may_be_compiling(run_python: Callable[..., str]) -> None:
    """Gradients registered after the first trace would silently be missing."""
    code = """
import torch, gemmascope_fast as gsf
sae = gsf.SAE(8, 32, gsf.JumpReLU(bandwidth=0.5, init_threshold=0.3))
x = torch.randn(6, 8)
def loss(x):
    acts = sae.encode(x, max_nnz=192)
    return (sae.decode(acts) - x).square().sum() + acts.l0().sum()
torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
found = {name: p.grad for name, p in sae.named_parameters()}
sae.zero_grad()
loss(x).backward()
for name, p in sae.named_parameters():
    print(name, found[name] is not None and torch.equal(found[name], p.grad) and bool(p.grad.any()))
"""
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
    assert run_python(code).splitlines() == [f"{name} True" for name in names]


# ---- torch.export


class Reconstruct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sae = gsf.SAE(8, 32, gsf.JumpReLU(init_threshold=0.5))

    def forward(self, x: Tensor) -> tuple[SparseActs, Tensor]:
        acts = self.sae.encode(x, max_nnz=1024)
        return acts, self.sae.decode(acts)


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
@pytest.mark.parametrize("trained", [True, False])
def test_an_exported_module_serves_every_batch(trained: bool) -> None:
    module = Reconstruct().requires_grad_(trained)
    shapes = {"x": {0: torch.export.Dim("n", min=2)}}
    program = torch.export.export(module, (torch.randn(6, 8),), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert [t for t in targets if "gemmascope_fast" in t] == [
        "gemmascope_fast.jumprelu_encode.default",
        "gemmascope_fast.decode.default",
    ]
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for runner in (program.module(), torch.export.load(buffer).module()):
        for n in (2, 11):
            x = torch.randn(n, 8)
            (acts, recon), (expected, expected_recon) = runner(x), module(x)
            assert acts.shape == (n, 32)
            assert_same(acts.values.detach(), expected.values.detach())
            assert_same(acts.indices, expected.indices)
            assert_same(recon.detach(), expected_recon.detach())


# ---- activation checkpointing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_nnz", [CAPACITY, None])
def test_checkpointing_gives_equal_gradients(kind: str, max_nnz: int | None) -> None:
    p, x = problem().leaves(), torch.randn(13, 23)
    loss = loss_of(kind, p, max_nnz)

    def recomputed(x: Tensor) -> Any:
        return checkpoint(loss, x, use_reentrant=False)

    found = gradients(kind, p, recomputed, x.clone())
    for ours, theirs in zip(found, gradients(kind, p, loss, x.clone()), strict=True):
        assert_same(ours, theirs)


def test_a_checkpointed_block_hands_over_activations() -> None:
    """SparseActs crosses the border of a checkpoint with its entries attached."""
    p, x = problem().leaves(), torch.randn(13, 23)

    def through(first: Callable[[Tensor], SparseActs]) -> Callable[[Tensor], Tensor]:
        return lambda x: gsf.decode(first(x), p.W_dec, p.b_dec).square().sum()

    plain = through(lambda x: encode("topk", p, x, None))
    outer = through(lambda x: checkpoint(encode, "topk", p, x, None, use_reentrant=False))
    found, expected = (gradients("topk", p, f, x.clone()) for f in (outer, plain))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
