"""Crosscoder and CrossLayerTranscoder as modules: made, moved, frozen, compiled, trained."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same
from test_multilayer import JUMP, D, F, L, build
from torch import Tensor, nn

import gemmascope_fast as gsf
from gemmascope_fast import Crosscoder, CrossLayerTranscoder, SparseActs, TopK
from gemmascope_fast.multilayer import MultiLayer

VECTORS = ("b_enc", "b_dec", "threshold")


def is_vector(name: str) -> bool:
    return name.split(".")[0] in VECTORS


def assert_fast_layout(module: MultiLayer) -> None:
    assert all(W.t().is_contiguous() and W.shape == (D, F) for W in module.W_enc)
    assert all(W.is_contiguous() and W.shape[0] == F for W in module.W_dec)


# ---- construction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packed", [True, False, [True, False, True]], ids=str)
def test_a_module_starts_as_single_layer_dictionaries(packed: Any, dtype: torch.dtype) -> None:
    module = CrossLayerTranscoder(L, D, F, JUMP, affine=True, packed=packed, dtype=dtype)
    assert_fast_layout(module)
    assert (module.n_layers, module.d_model, module.d_sae) == (L, D, F)
    flags = [packed] * L if isinstance(packed, bool) else packed
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same(module.b_dec.detach(), torch.zeros(L, D, dtype=wide))
    for i in range(L):
        first = i if flags[i] else 0
        assert module.outputs(i) == range(first, L)
        own = module.decoder(i)[:, i - first].detach()
        assert bool(((own.double().norm(dim=1) - 1).abs() < 8 * torch.finfo(dtype).eps).all())
        assert_same(module.W_enc[i].detach(), own.t())
        expected = torch.zeros(F, L - first, D, dtype=dtype)
        expected[:, i - first] = own
        assert_same(module.W_dec[i].detach(), expected.flatten(1))
        assert_same(module.b_enc[i].detach(), torch.zeros(F, dtype=wide))
        assert_same(module.threshold[i].detach(), torch.full((F,), 0.2, dtype=wide))
        assert_same(module.W_skip[i].detach(), torch.zeros(D, D, dtype=dtype))


def test_the_generator_decides_the_weights() -> None:
    first, second = (Crosscoder(L, D, F, generator=torch.manual_seed(7)) for _ in range(2))
    for ours, other in zip(first.parameters(), second.parameters(), strict=True):
        assert_same(ours.detach(), other.detach())
    other = Crosscoder(L, D, F, generator=torch.manual_seed(8))
    assert not torch.equal(first.W_dec[1], other.W_dec[1])
    assert not torch.equal(first.W_enc[0], first.W_enc[1])


def test_names_of_parameters() -> None:
    lists = ("W_enc", "b_enc", "threshold", "W_dec")
    names = {f"{name}.{i}" for name in lists for i in range(L)} | {"b_dec"}
    assert set(Crosscoder(L, D, F).state_dict()) == names
    assert set(CrossLayerTranscoder(L, D, F).state_dict()) == names
    affine = CrossLayerTranscoder(L, D, F, TopK(2), affine=True).state_dict()
    skips = {f"W_skip.{i}" for i in range(L)}
    assert set(affine) == {n for n in names if not n.startswith("threshold")} | skips


def test_the_meta_device_allocates_nothing() -> None:
    """The 524k CLT of Gemma 3 1B: 32.6 GiB packed, 60.7 GiB in full."""
    sizes = (26, 1152, 20_160)
    for packed, gib in ((True, 32.6), (False, 60.7)):
        module = CrossLayerTranscoder(*sizes, packed=packed, affine=False, device="meta")
        assert {p.device.type for p in module.parameters()} == {"meta"}
        assert sum(p.nbytes for p in module.parameters()) / 2**30 == pytest.approx(gib, abs=0.3)
        assert all(W.t().is_contiguous() for W in module.W_enc)


def test_repr_is_one_line() -> None:
    text = repr(Crosscoder(4, 6, 20, TopK(k=3)))
    assert text == "Crosscoder(n_layers=4, d_model=6, d_sae=20, TopK(k=3))"


# ---- moved and copied


def load_into_new(module: MultiLayer) -> MultiLayer:
    state = {name: t.contiguous() for name, t in module.state_dict().items()}
    other = CrossLayerTranscoder(L, D, F, JUMP, affine=True)
    assert other.load_state_dict(state).missing_keys == []
    return other


def pickled(module: MultiLayer) -> MultiLayer:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


MOVES: dict[str, Callable[[MultiLayer], MultiLayer]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "device": lambda m: m.to("cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "load": load_into_new,
}


@pytest.mark.parametrize("move", MOVES)
def test_layout_and_exact_vectors_survive(move: str) -> None:
    """A threshold rounded to bfloat16 moves the gate: vectors stay float32 under any cast."""
    module, x = build("affine clt"), torch.randn(4, L, D)
    module(x).square().sum().backward()
    expected = {name: t.clone() for name, t in module.state_dict().items()}
    moved = MOVES[move](module)
    assert_fast_layout(moved)
    dtypes = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}
    dtype = dtypes.get(move, torch.float32)
    for name, p in moved.named_parameters():
        kept = torch.float32 if is_vector(name) and dtype.itemsize == 2 else dtype
        assert_same(p.detach(), expected[name].to(kept), name)
        assert move == "load" or p.grad is None or p.grad.dtype == kept
    if dtype.itemsize == 2:
        assert moved.double().threshold[0].dtype == torch.float64
        assert_same(moved.bfloat16().b_dec.detach(), expected["b_dec"])


def test_to_empty_keeps_the_layout() -> None:
    module = CrossLayerTranscoder(L, D, F, device="meta").to_empty(device="cpu")
    assert_fast_layout(module)
    assert module.b_dec.device.type == module.W_dec[2].device.type == "cpu"


# ---- frozen


@pytest.mark.parametrize("center", [False, True])
def test_freezing_changes_no_bit(center: bool) -> None:
    module, x = Crosscoder(2, 256, 300, JUMP), torch.randn(40, 2, 256) + 3
    with torch.no_grad():
        expected = module.encode(x)
    module.freeze(center=x.mean(0) if center else None)
    assert not module.training and module.packed is not None and len(module.packed) == 2
    for ours, theirs in zip(module.encode(x), expected, strict=True):
        for name in ("offsets", "indices", "values", "gate"):
            assert_same(getattr(ours, name), getattr(theirs, name))
    assert not module(x).requires_grad


def replace_b_dec(module: MultiLayer) -> None:
    module.b_dec = nn.Parameter(torch.zeros(L, D))


THAWING: dict[str, Callable[[MultiLayer], object]] = {
    "unfreeze": lambda m: m.unfreeze(),
    "to": lambda m: m.to(torch.bfloat16),
    "load": lambda m: m.load_state_dict(build("clt").state_dict()),
    "replace": replace_b_dec,
    "reset": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("change", THAWING)
def test_what_changes_weights_unfreezes(change: str) -> None:
    module = build("clt").freeze()
    THAWING[change](module)
    assert module.packed is None and all(p.requires_grad for p in module.parameters())


def test_a_frozen_encoder_that_was_replaced_raises() -> None:
    module, x = build("clt").freeze(), torch.randn(4, L, D)
    module.W_enc[1] = nn.Parameter(module.W_enc[1].detach().clone(), requires_grad=False)
    text = re.escape("encode: frozen W_enc[1] was replaced or requires gradients again; call unfr")
    with pytest.raises(RuntimeError, match=text):
        module(x)
    module = build("clt").freeze().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"encode: frozen W_enc\[0\]"):
        module(x)
    module.unfreeze()(x).sum().backward()


# ---- compiled, exported, trained


def with_capacity(module: MultiLayer) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        acts = module.encode(x, max_nnz=600)
        given = (acts, x) if isinstance(module, CrossLayerTranscoder) else (acts,)
        return (module.decode(*given) - x).square().sum() + module.l0(acts).sum()

    return loss


def gradients(loss: Callable[[Tensor], Tensor], module: MultiLayer, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    value = loss(x)
    return [value.detach(), *torch.autograd.grad(value, [x, *module.parameters()])]


def test_a_step_compiles_to_one_graph() -> None:
    module = build("affine clt", layers=2)
    loss = with_capacity(module)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (6, 9):
            x = torch.randn(n, 2, D)
            found, wanted = gradients(compiled, module, x), gradients(loss, module, x)
            for ours, theirs in zip(found, wanted, strict=True):
                assert bool(theirs.any())
                assert_same(ours, theirs)


class Reconstruct(nn.Module):
    def __init__(self, module: MultiLayer) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.decode(self.module.encode(x, max_nnz=600))


@pytest.mark.parametrize("trained", [True, False])
def test_an_exported_module_serves_and_differentiates(trained: bool) -> None:
    """Without gradients the program adds in place; with them it holds ops that have a backward."""
    module = Reconstruct(build("crosscoder"))
    with torch.set_grad_enabled(trained):
        shapes = {"x": {0: torch.export.Dim("n", min=2)}}
        program = torch.export.export(module, (torch.randn(5, L, D),), dynamic_shapes=shapes)
    decoders = [str(n.target) for n in program.graph.nodes if "decode" in str(n.target)]
    assert decoders == [f"gemmascope_fast.{'decode' if trained else 'decode_'}.default"] * L
    x, runner = torch.randn(9, L, D), program.module()
    torch.testing.assert_close(runner(x), module(x), rtol=1e-5, atol=1e-5)
    if trained:
        grads = []
        for run in (runner, module):
            module.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in module.parameters()])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_our_adam_follows_torchs() -> None:
    module, x = build("clt"), torch.randn(8, L, D)
    other = copy.deepcopy(module)
    start = copy.deepcopy(module)
    ours = gsf.optim.Adam(module, lr=1e-3)
    theirs = torch.optim.Adam(other.parameters(), lr=1e-3, betas=(0.0, 0.999))
    for net, optimizer in ((module, ours), (other, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            acts = net.encode(x)
            ((net.decode(acts, x) - x).square().sum() + net.l0(acts).sum()).backward()
            optimizer.step()
    for (name, p), q, old in zip(
        module.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        assert not torch.equal(p, old), name
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


# ---- messages


def acts(f: int = F, n: int = 2) -> SparseActs:
    return SparseActs.from_dense(torch.ones(n, f))


STACK = torch.zeros(2, L, D)
W = torch.zeros(F, L * D)
B_DEC = torch.zeros(L, D)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: Crosscoder(0, D, F), ValueError, "Crosscoder: n_layers must be an int >= 1, got 0"),
    (lambda: Crosscoder(L, 2.0, F), ValueError, "Crosscoder: d_model must be an int >= 1, got 2.0"),
    (
        lambda: CrossLayerTranscoder(L, D, True),
        ValueError,
        "CrossLayerTranscoder: d_sae must be an int >= 1, got True",
    ),
    (
        lambda: Crosscoder(L, D, F, "topk"),
        TypeError,
        "Crosscoder: activation must be JumpReLU, TopK or BatchTopK, got str",
    ),
    (
        lambda: Crosscoder(L, D, F, packed=[True]),
        ValueError,
        "Crosscoder: packed must be a bool, or one for each of the 3 layers, got [True]",
    ),
    (
        lambda: Crosscoder(L, D, F).encode(torch.zeros(2, D)),
        ValueError,
        "encode: x must have shape [*batch, n_layers=3, d_model=20], got (2, 20)",
    ),
    (
        lambda: Crosscoder(L, D, F).encode(torch.zeros(2, L, D, dtype=torch.int64)),
        TypeError,
        "encode: x must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        lambda: Crosscoder(L, D, F, TopK(2)).encode(STACK, max_nnz=9),
        ValueError,
        "encode: TopK always stores k entries per token; drop max_nnz",
    ),
    (
        lambda: Crosscoder(L, D, F).encode(STACK + 1, max_nnz=1),
        gsf.CapacityError,
        "max_nnz",
    ),
    (
        lambda: Crosscoder(L, D, F).freeze(center=torch.zeros(D)),
        ValueError,
        "freeze: center must have shape [n_layers=3, d_model=20], got (20,)",
    ),
    (
        lambda: build("affine clt").decode([acts()] * L),
        ValueError,
        "decode: this transcoder has an affine skip connection: pass x",
    ),
    (
        lambda: build("affine clt").decode([acts()] * L, STACK[:, :2]),
        ValueError,
        "decode: x must have shape [*batch, n_layers=3, d_model=20], got (2, 2, 20)",
    ),
    (
        lambda: build("affine clt").decode([acts()] * L, STACK[:1]),
        ValueError,
        "multi_decode: skip must have shape (2, 3, 20), got (1, 3, 20)",
    ),
    (
        lambda: build("clt").decode([acts()] * 2),
        ValueError,
        "multi_decode: acts and W_dec must have one element per source, got 2 and 3",
    ),
    (
        lambda: build("clt").decode(acts()),
        TypeError,
        "multi_decode: acts must be a sequence of SparseActs, got SparseActs",
    ),
    (
        lambda: build("clt").decode([acts(), torch.zeros(2, F), acts()]),
        TypeError,
        "multi_decode: source 1: acts must be a SparseActs, got Tensor",
    ),
    (
        lambda: build("clt").decode([acts(), acts(), acts(F - 1)]),
        ValueError,
        "multi_decode: source 2: W_dec must have shape [d_sae=36, d_out], got (37, 20)",
    ),
    (
        lambda: build("clt").decode([acts(), acts(n=3), acts()]),
        ValueError,
        "multi_decode: acts must have one batch shape, got (2,) in source 0 and (3,) in source 1",
    ),
    (
        lambda: build("clt").decode([acts()] * L, dtype=torch.int32),
        TypeError,
        "multi_decode: dtype must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    (
        lambda: gsf.multi_decode([], [], B_DEC),
        ValueError,
        "multi_decode: acts and W_dec must have one element per source, got 0 and 0",
    ),
    (
        lambda: gsf.multi_decode([acts()], [W], B_DEC[0]),
        ValueError,
        "multi_decode: b_dec must have shape [L, d], got (20,)",
    ),
    (
        lambda: gsf.multi_decode([acts()], [W[:, D:]], B_DEC),
        ValueError,
        "multi_decode: W_dec[0] must have shape [d_sae, m * d] with m = 3 and d = 20, as b_dec is "
        "[L, d] = [3, 20]; got (37, 40)",
    ),
    (
        lambda: gsf.multi_decode([acts()] * 2, [W, W[:, 1:]], B_DEC),
        ValueError,
        "multi_decode: W_dec[1] must have shape [d_sae, m * d] with m = 1 .. 3 and d = 20",
    ),
    (
        lambda: gsf.multi_decode([acts()] * 2, [W, W.repeat(1, 2)], B_DEC),
        ValueError,
        "multi_decode: W_dec[1] must have shape [d_sae, m * d] with m = 1 .. 3 and d = 20",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD, ids=[case[2][:60] for case in BAD])
def test_messages_name_what_is_wrong(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()
