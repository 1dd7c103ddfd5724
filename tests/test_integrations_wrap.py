"""`gsf.wrap`: home-made modules against their own dense computation, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gemmascope_fast as gsf

D, F, OUT, N = 12, 40, 7, 20


class Bare(nn.Module):
    """Parameters of any orientation, under names of its own."""

    def __init__(self, up: bool, down: bool, d_out: int = OUT, d_in: int = D, f: int = F) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(0.5 * torch.randn((f, d_in) if up else (d_in, f)))
        self.inner = nn.ParameterDict(
            {"down": nn.Parameter(0.5 * torch.randn((d_out, f) if down else (f, d_out)))}
        )
        self.offset = nn.Parameter(torch.randn(f))
        self.last = nn.Parameter(torch.randn(d_out))
        self.limit = nn.Parameter(0.3 + torch.rand(f))


class Layers(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(D, F), nn.Linear(F, OUT, bias=bias)])


def topk(pre: Tensor, k: int) -> Tensor:
    values, at = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, at, values)


def agrees(wrapped: Any, dense: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> None:
    """Reconstruction, the parameters' own gradients, and that of x."""
    x = torch.randn(2, N // 2, wrapped.d_in, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    found = wrapped(x)
    expected = dense(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wrapped.zero_grad()
    found.square().sum().backward()
    mine = [p.grad for p in (*parameters, x)]
    theirs = torch.autograd.grad(expected.square().sum(), [*parameters, x])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # no copies: an edit shows
        parameters[0].data.mul_(0.5)
        torch.testing.assert_close(wrapped(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_bare_parameters(up: bool, down: bool) -> None:
    module = Bare(up, down)
    wrapped = gsf.wrap(
        *(module,),
        encoder="up",
        decoder="inner.down",
        activation=gsf.TopK(5),
        encoder_bias="offset",
        decoder_bias="last",
    )

    def dense(x: Tensor) -> Tensor:
        W_enc = module.up.t() if up else module.up
        W_dec = module.inner["down"].t() if down else module.inner["down"]
        return topk(x @ W_enc + module.offset, 5) @ W_dec + module.last

    parameters = [module.up, module.inner["down"], module.offset, module.last]
    agrees(wrapped, dense, parameters)
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in module.parameters()]


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(bias: bool) -> None:
    module = Layers(bias)
    encoder, decoder = module.layers
    wrapped = gsf.wrap(module, encoder="layers.0", decoder="layers.1", activation=gsf.TopK(4))
    agrees(wrapped, lambda x: decoder(topk(encoder(x), 4)), list(module.parameters()))
    module.double()
    assert wrapped(torch.randn(3, D).double()).dtype == torch.float64


def test_jumprelu_and_its_threshold() -> None:
    module = Bare(False, False, d_out=D)
    wrapped = gsf.wrap(
        *(module,),
        encoder="up",
        decoder="inner.down",
        activation=gsf.JumpReLU(bandwidth=0.5),
        encoder_bias="offset",
        decoder_bias="last",
        threshold="limit",
        center=True,
    )
    twin = gsf.SAE(D, F, gsf.JumpReLU(bandwidth=0.5), semantics=gsf.Semantics(center=True))
    names = {"W_enc": module.up, "W_dec": module.inner["down"], "b_enc": module.offset}
    names |= {"b_dec": module.last, "threshold": module.limit}
    with torch.no_grad():
        for name, p in names.items():
            getattr(twin, name).copy_(p)
    x = torch.randn(N, D)
    for one in (wrapped, twin):
        acts = one.encode(x)
        ((one.decode(acts) - x).square().sum() + acts.l0().sum()).backward()
    for name, p in names.items():
        assert p.grad is not None and p.grad.abs().sum() > 0
        torch.testing.assert_close(p.grad, getattr(twin, name).grad, msg=name)


def test_batchtopk_with_tied_weights() -> None:
    module = Bare(True, False, d_out=D)
    wrapped = gsf.wrap(module, encoder="up", decoder="up", activation=gsf.BatchTopK(3), d_sae=F)

    def dense(x: Tensor) -> Tensor:
        pre = (x.reshape(-1, D) @ module.up.t()).relu()
        kept = topk(pre.reshape(1, -1), 3 * N).reshape(pre.shape)
        return (kept @ module.up).reshape(x.shape)

    agrees(wrapped, dense, [module.up])
    assert wrapped.train().training and wrapped.eval()(torch.randn(2, D)).shape == (2, D)


def test_layouts_that_shapes_leave_open() -> None:
    square = Bare(True, False, d_out=D, f=D)
    names = {"encoder": "up", "decoder": "inner.down", "activation": gsf.TopK(2)}
    with pytest.raises(ValueError, match=r"wrap: encoder of shape \[12, 12\] is square: pass enc"):
        gsf.wrap(square, **names, encoder_bias="offset")
    with pytest.raises(ValueError, match=r"wrap: decoder of shape \[12, 12\] is square: pass dec"):
        gsf.wrap(square, **names, d_sae=D, encoder_layout="[d_sae, d_in]")
    chosen = {"encoder_layout": "[d_sae, d_in]", "decoder_layout": "[d_sae, d_out]"}
    wrapped = gsf.wrap(square, **names, **chosen)
    agrees(
        *(wrapped, lambda x: topk(x @ square.up.t(), 2) @ square.inner["down"]),
        [square.up, square.inner["down"]],
    )
    oblong = Bare(True, False, d_out=D)
    with pytest.raises(ValueError, match=r"encoder of shape \[40, 12\] fits both ways: .* d_sae"):
        gsf.wrap(oblong, **names)
    assert gsf.wrap(oblong, **names, d_sae=F).d_sae == F
    assert gsf.wrap(oblong, **names, decoder_bias="last").d_sae == F
    assert gsf.wrap(Bare(False, True), **names).d_sae == F  # the side that both matrices have


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"encoder": "nothing.here"}, AttributeError, "encoder='nothing.here': Bare has no attr"),
        ({"encoder": 3}, TypeError, "encoder must be an attribute path, got int"),
        ({"encoder": "inner"}, TypeError, "encoder must lead to an nn.Linear or a floating-point"),
        ({"encoder_bias": "up"}, TypeError, r"encoder_bias must lead to a .* vector, got \(40, 12"),
        (
            {"encoder_bias": "last"},
            ValueError,
            r"encoder must have a side of d_sae=7, got \[40",
        ),
        ({"decoder_bias": "offset"}, ValueError, r"decoder_bias must have 7 elements, got \[40\]"),
        ({"d_sae": 12}, ValueError, r"decoder must have a side of d_sae=12, got \[40, 7\]"),
        ({"d_sae": "40"}, TypeError, "d_sae must be an int"),
        ({"activation": "topk"}, TypeError, "activation must be JumpReLU, TopK or BatchTopK, got"),
        ({"activation": gsf.JumpReLU()}, ValueError, "needs threshold"),
        ({"activation": gsf.TopK(41)}, ValueError, r"^wrap: k must be in \[0, d_sae=40\], got 41"),
        ({"threshold": "limit"}, ValueError, "has no threshold"),
        ({"encoder_layout": "[F, D]"}, ValueError, "encoder_layout must be one of"),
        ({"encoder_layout": "[d_in, d_sae]"}, ValueError, r"decoder must be \[d_sae=12, d_out\]"),
        ({"center": True}, ValueError, "center needs a decoder_bias"),
        ({"center": True, "decoder_bias": "last"}, ValueError, "center needs d_in == d_out"),
        ({"semantics": "unknown"}, ValueError, "preset must be one of"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = {"encoder": "up", "decoder": "inner.down", "activation": gsf.TopK(2)}
    with pytest.raises(error, match=message):
        gsf.wrap(Bare(True, False), **{**names, **changes})


def test_bad_input_about_modules() -> None:
    names = {"encoder": "layers.0", "decoder": "layers.1", "activation": gsf.TopK(2)}
    with pytest.raises(TypeError, match=r"wrap: module must be a torch.nn.Module, got dict"):
        gsf.wrap({}, **names)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"encoder_bias must not be given: the nn.Linear"):
        gsf.wrap(Layers(), **names, encoder_bias="layers.0.bias")
    with pytest.raises(ValueError, match=r"encoder_layout must not be given: encoder is an nn.Lin"):
        gsf.wrap(Layers(), **names, encoder_layout="[d_sae, d_in]")
    with pytest.raises(ValueError, match="encode: TopK always stores k entries"):
        gsf.wrap(Layers(), **names).encode(torch.zeros(2, D), max_nnz=3)
