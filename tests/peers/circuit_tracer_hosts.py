"""Transcoders of circuit-tracer, what is called on them, and how results are compared.

Not on PyPI: `pip install git+https://github.com/decoderesearch/circuit-tracer@v0.5.0`, or a
checkout on PYTHONPATH. Every problem is run on the stock classes, then with the backend: values,
COO indices and gradients must agree, and every method must have been served.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "circuit_tracer",
    reason="circuit-tracer is not installed: pip install "
    "git+https://github.com/decoderesearch/circuit-tracer@v0.5.0",
)
from circuit_tracer.transcoder import activation_functions  # noqa: E402
from circuit_tracer.transcoder import cross_layer_transcoder as cross  # noqa: E402
from circuit_tracer.transcoder import single_layer_transcoder as single  # noqa: E402

from gemmascope_fast.integrations import circuit_tracer  # noqa: E402

N, D, F, L = 40, 24, 192, 3
SINGLE = ("encode", "encode_sparse", "decode", "decode_sparse", "forward")
CROSS = (
    *("encode", "encode_layer", "encode_sparse", "select_decoder_vectors"),
    *("compute_reconstruction", "forward"),
)
CLASSES = {single.SingleLayerTranscoder: SINGLE, cross.CrossLayerTranscoder: CROSS}
TOPK = pytest.param(
    "topk",
    marks=pytest.mark.skipif(
        not hasattr(activation_functions, "TopK"), reason="circuit-tracer 0.4 has no TopK"
    ),
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Each test leaves the classes as they are without the backend."""
    before = {kind: dict(vars(kind)) for kind in CLASSES}
    torch.manual_seed(0)
    yield
    circuit_tracer.uninstall()
    for kind, namespace in before.items():
        for name, value in namespace.items():
            assert vars(kind)[name] is value, name


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that the backend leaves to the host, in order."""
    calls: list[str] = []

    def watch(kind: type, name: str) -> None:
        stock = vars(kind)[name]

        @functools.wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return stock(self, *args, **kwargs)

        method.__circuit_tracer__ = stock  # type: ignore[attr-defined]
        monkeypatch.setattr(kind, name, method)

    for kind, names in CLASSES.items():
        for name in names:
            watch(kind, name)
    return calls


def whole(*shape: int, low: int = -2, high: int = 3) -> Tensor:
    return torch.randint(low, high, shape).float()


def activation(kind: str, dtype: torch.dtype, shape: tuple[int, ...] = (F,)) -> Any:
    if kind == "topk":
        return activation_functions.TopK(9)
    if kind == "relu":
        return torch.nn.functional.relu
    theta = torch.rand(shape) * 3 + 1
    theta.view(-1)[::17] *= -0.02  # a host may have some below 0
    return activation_functions.JumpReLU(theta.to(dtype), 0.5)


def one_layer(
    kind: str, dtype: torch.dtype = torch.float32, *, skip: bool = False, exact: bool = False
) -> Any:
    made = single.SingleLayerTranscoder(
        D, F, activation(kind, dtype), 0, skip_connection=skip, device="cpu", dtype=dtype
    )
    fill(made, exact)
    return made


def cross_layer(
    kind: str, dtype: torch.dtype = torch.float32, *, skip: bool = False, exact: bool = False
) -> Any:
    made = cross.CrossLayerTranscoder(
        *(L, F, D),
        activation_function="jump_relu" if kind == "jumprelu" else "relu",
        skip_connection=skip,
        lazy_decoder=False,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    if kind == "jumprelu":
        made.activation_function = activation(kind, dtype, (L, 1, F))
    fill(made, exact)
    return made


def fill(made: Any, exact: bool) -> None:
    """Random weights, few latents active; with `exact` all sums are exact in float32."""
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "threshold" in name:
                if exact:
                    p.copy_((p * 4).round() / 4)
                continue
            p.copy_(whole(*p.shape) / 4 if exact else torch.randn(p.shape) * 0.4)
        made.b_enc.sub_(2.0)
        if made.W_skip is not None:
            assert not torch.equal(made.W_skip, made.W_skip.mT)


def inputs(dtype: torch.dtype, *shape: int, exact: bool = False) -> Tensor:
    return (whole(*shape, low=-160, high=160) / 64 if exact else torch.randn(shape)).to(dtype)


def same(found: Any, expected: Any, name: str = "") -> None:
    """Exactly the same support, order, dtype, layout; values to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key], f"{name}[{key}]")
        return
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, f"{name}[{i}]")
        return
    kind = (found.shape, found.dtype, found.layout, found.device)
    assert kind == (expected.shape, expected.dtype, expected.layout, expected.device), name
    if expected.is_sparse:
        assert found.is_coalesced() and expected.is_coalesced(), name
        assert torch.equal(found.indices(), expected.indices()), name
        found, expected = found.values(), expected.values()
    assert found.is_contiguous() == expected.is_contiguous(), name
    bounds = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.03, 0.05)}
    rtol, atol = bounds.get(expected.dtype, (0.0, 0.0))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def single_calls(made: Any, x: Tensor) -> dict[str, Callable[[], Any]]:
    dense = made.encode(x).detach()
    found = made.encode_sparse(x)[0].detach().coalesce()
    return {
        "encode": lambda: made.encode(x),
        "encode of a batch": lambda: made.encode(x.view(2, -1, D)),
        "encode_sparse": lambda: made.encode_sparse(x),
        "zero_positions": lambda: made.encode_sparse(x, zero_positions=slice(0, 4)),
        "decode": lambda: made.decode(dense, x),
        "decode_sparse": lambda: made.decode_sparse(found, x),
        "forward": lambda: made(x),
        "forward of a batch": lambda: made(x.view(2, -1, D)),
    }


def cross_calls(made: Any, x: Tensor) -> dict[str, Callable[[], Any]]:
    found = made.encode_sparse(x)[0].detach().coalesce()
    selected = made.select_decoder_vectors(found)
    return {
        "encode": lambda: made.encode(x),
        "encode_layer": lambda: made.encode_layer(x[1:2], 1),
        "encode_sparse": lambda: made.encode_sparse(x),
        "zero_positions": lambda: made.encode_sparse(x, zero_positions=slice(0, 4)),
        "select": lambda: made.select_decoder_vectors(found),
        "select of dense": lambda: made.select_decoder_vectors(found.to_dense()),
        "reconstruction": lambda: made.compute_reconstruction(
            *(selected[0], selected[1], selected[3].detach(), x)
        ),
        "decode": lambda: made.decode(found, x),
        "decode of dense": lambda: made.decode(found.to_dense(), x),
        "components": lambda: made.compute_attribution_components(x, slice(0, 2)),
        **({} if made.W_skip is not None else {"forward": lambda: made(x)}),
    }
