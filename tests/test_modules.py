"""SAE and Transcoder: construction, memory layout, copies, a training step, messages."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import SAE, BatchTopK, JumpReLU, TopK, Transcoder

OPS = (
    *("jumprelu_encode", "topk_encode", "batchtopk_encode"),
    *("decode", "encode_backward", "decode_backward"),
)
ACTIVATIONS = [JumpReLU(bandwidth=0.5, init_threshold=0.1), TopK(3), BatchTopK(2.5)]


def build(kind: type[SAE], activation: Any = ACTIVATIONS[0], **options: Any) -> SAE:
    extra = {"affine": True} if kind is Transcoder else {}
    generator = torch.Generator().manual_seed(3)
    sae = kind(6, 20, activation, generator=generator, **extra, **options)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(torch.rand(p.shape, generator=generator).to(p.dtype) / 4)
    return sae


def assert_fast_layout(sae: SAE) -> None:
    assert sae.W_enc.t().is_contiguous() and sae.W_dec.is_contiguous()
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((6, 20), (20, sae.d_out))


def dense_recon(sae: SAE, x: Tensor) -> Tensor:
    """The module's formula with matrices."""
    pre = x @ sae.W_enc + sae.b_enc
    if isinstance(sae.activation, JumpReLU):
        acts = pre * (pre > sae.threshold)
    elif isinstance(sae.activation, TopK):
        kept = pre.relu().topk(sae.activation.k)
        acts = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    else:
        count = int(sae.activation.k * pre[..., 0].numel())
        acts = pre.relu() * (pre >= pre.flatten().topk(count).values[-1])
    recon = acts @ sae.W_dec + sae.b_dec
    skip = getattr(sae, "W_skip", None)
    return recon if skip is None else recon + torch.einsum("...i,io->...o", x, skip)


# ---- construction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("d_out", [None, 9])
def test_initial_weights_follow_the_recipe(d_out: int | None, dtype: torch.dtype) -> None:
    sae = SAE(6, 20, JumpReLU(init_threshold=0.25), d_out=d_out, dtype=dtype)
    assert_fast_layout(sae)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (6, 20, d_out or 6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sae.W_enc.dtype == sae.W_dec.dtype == dtype
    assert_same(sae.b_enc.detach(), torch.zeros(20, dtype=wide))
    assert_same(sae.b_dec.detach(), torch.zeros(sae.d_out, dtype=wide))
    assert_same(sae.threshold.detach(), torch.full((20,), 0.25, dtype=wide))
    if d_out is None:
        assert_same(sae.W_enc.detach(), sae.W_dec.detach().t())
    tolerance = 8 * torch.finfo(dtype).eps
    for rows in (sae.W_dec.detach(), sae.W_enc.detach().t()):
        assert bool(((rows.double().norm(dim=1) - 1).abs() < tolerance).all())


def test_bfloat16_rows_have_unit_norm_up_to_the_rounding_of_their_elements() -> None:
    rows = SAE(1024, 50, dtype=torch.bfloat16).W_dec.detach()
    assert float((rows.double().norm(dim=1) - 1).abs().max()) < 5e-4


@pytest.mark.parametrize("kind", [SAE, Transcoder])
def test_the_generator_decides_the_weights(kind: type[SAE]) -> None:
    first, second = (kind(6, 20, d_out=5, generator=torch.manual_seed(7)) for _ in range(2))
    for (name, ours), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert_same(ours.detach(), other.detach(), name)
    assert not torch.equal(first.W_dec, kind(6, 20, d_out=5, generator=torch.manual_seed(8)).W_dec)


def test_parameters_depend_on_the_activation() -> None:
    names = {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert set(dict(SAE(6, 20).named_parameters())) == names | {"threshold"}
    assert SAE(6, 20).activation == JumpReLU(bandwidth=0.001, init_threshold=0.001)
    for activation in ACTIVATIONS[1:]:
        sae = SAE(6, 20, activation)
        assert set(dict(sae.named_parameters())) == names and sae.threshold is None
    assert set(dict(Transcoder(6, 20, TopK(2)).named_parameters())) == names
    affine = Transcoder(6, 20, TopK(2), d_out=4, affine=True, dtype=torch.bfloat16)
    assert_same(affine.W_skip.detach(), torch.zeros(6, 4, dtype=torch.bfloat16))


def test_meta_device_allocates_nothing() -> None:
    sae = SAE(5376, 1 << 20, device="meta")
    assert (sae.W_enc.device.type, sae.threshold.device.type) == ("meta", "meta")
    assert sae.W_enc.t().is_contiguous()


# ---- what they compute


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("kind", [SAE, Transcoder])
def test_forward_is_the_formula(backend: Any, kind: type[SAE], activation: Any) -> None:
    sae, x = build(kind, activation, d_out=5), torch.randn(2, 4, 6)
    recon = sae(x)
    torch.testing.assert_close(recon, dense_recon(sae, x), rtol=1e-5, atol=1e-5)
    acts = sae.encode(x)
    assert acts.shape == (2, 4, 20) and recon.shape == (2, 4, 5)
    again = sae.decode(acts, x) if isinstance(sae, Transcoder) else sae.decode(acts)
    assert_same(again.detach(), recon.detach())


def test_the_affine_skip_is_x_times_W_skip() -> None:
    """The orientation: a transposed skip gives another result without any error."""
    sae = Transcoder(3, 2, TopK(0), affine=True)
    with torch.no_grad():
        sae.W_skip.copy_(torch.tensor([[0.0, 1, 2], [0, 0, 3], [0, 0, 0]]))
    assert_same(sae(torch.tensor([1.0, 10, 100])).detach(), torch.tensor([0.0, 1, 32]))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("kind", [SAE, Transcoder])
def test_adam_follows_dense_pytorch(backend: Any, kind: type[SAE], activation: Any) -> None:
    """Three steps in float32 stay close to the same steps with matrices.

    The threshold is compared elsewhere: dense autograd has no straight-through gradient.
    """
    sae, x = build(kind, activation), torch.randn(8, 6)
    other = copy.deepcopy(sae)
    for module in (sae, other):
        if module.threshold is not None:
            module.threshold.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for module, forward in ((sae, sae), (other, lambda x: dense_recon(other, x))):
        adam = torch.optim.Adam(module.parameters(), lr=1e-3)
        for _ in range(3):
            adam.zero_grad()
            (forward(x) - x).square().sum().backward()
            adam.step()
    assert_fast_layout(sae)
    for name, p in sae.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, start[name]), name
            assert p.grad.stride() == p.stride() and p.grad.dtype == p.dtype
            torch.testing.assert_close(p, dict(other.named_parameters())[name], rtol=0, atol=2e-5)


# ---- layout and dtype through the ways that modules are moved and copied

MOVES = {
    "to dtype": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to device": lambda m: m.to("cpu"),
    "deepcopy": copy.deepcopy,
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "load": lambda m: load_into_new(m),
}


def load_into_new(sae: SAE) -> SAE:
    state = {name: t.contiguous() for name, t in sae.state_dict().items()}
    other = type(sae)(6, 20, sae.activation, **{"affine": True} if type(sae) is Transcoder else {})
    assert other.load_state_dict(state).missing_keys == []
    return other


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", [SAE, Transcoder])
def test_the_fast_layout_survives(kind: type[SAE], move: str) -> None:
    sae = build(kind)
    expected = {name: t.clone() for name, t in sae.state_dict().items()}
    moved = MOVES[move](sae)
    assert_fast_layout(moved)
    if move == "to_empty":
        return
    for name, t in moved.state_dict().items():
        assert_same(t, expected[name].to(t.dtype), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_and_thresholds_are_never_rounded(dtype: torch.dtype) -> None:
    """A threshold rounded to bfloat16 moves the gate: it stays float32 when the module is cast."""
    sae = build(Transcoder)
    expected = {name: t.clone() for name, t in sae.state_dict().items()}
    sae(torch.randn(4, 6)).sum().backward()
    sae.to(dtype)
    assert sae.W_enc.dtype == sae.W_dec.dtype == sae.W_skip.dtype == sae.W_enc.grad.dtype == dtype
    for name in ("b_enc", "b_dec", "threshold"):
        assert_same(getattr(sae, name).detach(), expected[name], name)
        assert getattr(sae, name).grad.dtype == torch.float32
    assert sae.double().threshold.dtype == torch.float64


def test_a_pickled_copy_encodes_the_same(tmp_path: Any) -> None:
    sae, x = build(Transcoder), torch.randn(4, 6)
    torch.save(sae, tmp_path / "sae.pt")
    read = torch.load(tmp_path / "sae.pt", weights_only=False)
    assert_fast_layout(read)
    assert_same(read(x).detach(), sae(x).detach())


# ---- messages


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: SAE(0, 20), ValueError, "SAE: d_in must be an int >= 1, got 0"),
    (lambda: SAE(6, 2.0), ValueError, "SAE: d_sae must be an int >= 1, got 2.0"),
    (lambda: Transcoder(6, 20, d_out=-1), ValueError, "Transcoder: d_out must be an int >= 1, got"),
    (lambda: SAE(6, True), ValueError, "SAE: d_sae must be an int >= 1, got True"),
    (
        lambda: SAE(6, 20, "topk"),
        TypeError,
        "SAE: activation must be JumpReLU, TopK or BatchTopK, got str",
    ),
    (
        lambda: SAE(6, 20, TopK(2)).encode(torch.zeros(1, 6), max_nnz=9),
        ValueError,
        "encode: TopK always stores k entries per token; drop max_nnz",
    ),
    (
        lambda: SAE(6, 20).encode(torch.zeros(3, 5)),
        ValueError,
        "jumprelu_encode: x must have shape [*batch, d_in=6], W_enc being [d_in, d_sae] = [6, 20]; "
        "got (3, 5)",
    ),
    (
        lambda: SAE(6, 20, device="meta").loss(torch.zeros(3, 6, device="meta")),
        ValueError,
        "loss: x must have values, and is on the meta device",
    ),
    (lambda: TopK(-1), ValueError, "TopK: k must be >= 0, got -1"),
    (lambda: TopK(2.0), TypeError, "TopK: k must be an int, got float"),
    (lambda: BatchTopK(-0.5), ValueError, "BatchTopK: k must be finite and >= 0, got -0.5"),
    (lambda: BatchTopK("3"), TypeError, "BatchTopK: k must be a number, got str"),
    (lambda: JumpReLU(-1), ValueError, "JumpReLU: bandwidth must be finite and >= 0, got -1"),
    (
        lambda: JumpReLU(init_threshold=float("nan")),
        ValueError,
        "JumpReLU: init_threshold must be finite, got nan",
    ),
    (
        lambda: SAE(6, 20, JumpReLU(init_threshold=-1), semantics=gsf.Semantics(threshold="log")),
        ValueError,
        "JumpReLU: init_threshold must be finite and > 0, got -1",
    ),
    (
        lambda: SAE(6, 20, dtype=torch.int8),
        TypeError,
        "SAE: dtype must be float32, bfloat16, float16 or float64, got torch.int8",
    ),
    (
        lambda: gsf.Crosscoder(2, 6, 20, dtype="float32"),
        TypeError,
        "Crosscoder: dtype must be float32, bfloat16, float16 or float64, got 'float32'",
    ),
    (lambda: SAE(6, 20, TopK(21)), ValueError, "SAE: k must be in [0, d_sae=20], got 21"),
    (
        lambda: SAE(1 << 30, 1 << 30, TopK(1 << 31)),  # before any memory is asked for
        ValueError,
        "SAE: k must be in [0, d_sae=1073741824], got 2147483648",
    ),
    (
        lambda: gsf.Crosscoder(2, 6, 20, TopK(21)),
        ValueError,
        "Crosscoder: k must be in [0, d_sae=20], got 21",
    ),
    (
        lambda: setattr(SAE(6, 20, TopK(2)), "activation", TopK(21)),
        ValueError,
        "SAE: k must be in [0, d_sae=20], got 21",
    ),
    (
        lambda: setattr(gsf.Crosscoder(2, 6, 20, TopK(2)), "activation", "topk"),
        TypeError,
        "Crosscoder: activation must be JumpReLU, TopK or BatchTopK, got str",
    ),
    (
        lambda: SAE(6, 20, JumpReLU(bandwidth=0)).encode(torch.zeros(3, 6)),
        ValueError,
        "jumprelu_encode: threshold requires grad but bandwidth is 0: pass bandwidth > 0",
    ),
    (
        lambda: build(Transcoder).decode(gsf.SparseActs.from_dense(torch.zeros(1, 20))),
        ValueError,
        "decode: this transcoder has an affine skip connection: pass x",
    ),
    (
        lambda: build(Transcoder).decode(
            gsf.SparseActs.from_dense(torch.zeros(3, 20)), torch.zeros(1, 6)
        ),
        ValueError,
        "decode: x must have the shape that was encoded, (3, 6), got (1, 6)",
    ),
    (
        lambda: SAE(6, 20).decode(gsf.SparseActs.from_dense(torch.zeros(1, 21))),
        ValueError,
        "decode: W_dec must have shape [d_sae=21, d_out], got (20, 6)",
    ),
    (
        lambda: SAE(6, 20).decode(torch.zeros(1, 20)),
        TypeError,
        "decode: acts must be a SparseActs, got Tensor",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD, ids=[case[2][:40] for case in BAD])
def test_messages_name_what_is_wrong(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_a_refused_activation_is_not_taken() -> None:
    sae = SAE(6, 20, TopK(20))
    for bad in (TopK(21), "topk"):
        with pytest.raises((TypeError, ValueError)):
            sae.activation = bad  # type: ignore[assignment]
    assert sae.activation == TopK(20) and sae.encode(torch.ones(2, 6)).nnz == 40
    sae.activation = BatchTopK(1.5)
    assert sae.encode(torch.ones(2, 6)).nnz <= 3


def test_repr_shows_sizes_and_activation() -> None:
    text = repr(Transcoder(6, 20, TopK(k=3), d_out=4))
    assert text == "Transcoder(d_in=6, d_sae=20, d_out=4, TopK(k=3))"
    assert "JumpReLU(bandwidth=0.001, init_threshold=0.001)" in repr(SAE(6, 20))


def test_numbers_of_numpy_count_as_numbers() -> None:
    n, x = np.int64, torch.randn(64, 16)
    sae = gsf.SAE(n(16), n(32), gsf.TopK(n(4)), d_out=np.int32(16))
    assert type(sae.activation.k) is int and sae.d_sae == 32
    assert gsf.JumpReLU(np.float32(0.5)) == gsf.JumpReLU(0.5)
    assert type(gsf.BatchTopK(np.float32(2.5)).k) is float
    assert gsf.Crosscoder(n(2), n(16), n(32)).n_layers == 2
    acts = sae.encode(x)
    found = [gsf.queries.top_per_token(acts, k)[1] for k in (2, n(2))]
    assert torch.equal(*found)
    assert acts.topk(n(2)).nnz == 128 and gsf.topk_encode(x, sae.W_enc, sae.b_enc, n(4)).nnz == 256
    sizes = {"d_sae": n(32), "steps": n(2), "batch_size": n(32), "target_l0": np.float32(4)}
    preset = gsf.Preset(lr=np.float32(1e-3), calibration_tokens=n(32))
    made = gsf.train(x, **sizes, preset=preset, matryoshka=np.array([8, 32]).tolist(), seed=n(1))
    assert made.d_sae == 32
    for value in (np.bool_(True), True, np.float64(4), "4"):
        with pytest.raises(TypeError, match="TopK: k must be an int"):
            gsf.TopK(value)
        with pytest.raises(ValueError, match="SAE: d_in must be an int"):
            gsf.SAE(value, 4)
    with pytest.raises(TypeError, match="BatchTopK: k must be a number, got bool"):
        gsf.BatchTopK(np.bool_(True))
