"""`integrations.circuit_tracer` against circuit-tracer's own transcoders.

Not on PyPI: `pip install git+https://github.com/decoderesearch/circuit-tracer@v0.5.0`, or a
checkout on PYTHONPATH. Every problem is run on the stock classes, then with the backend: values,
COO indices and gradients must agree, and every method must have been served.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", TOPK])
def test_one_layer_is_the_hosts(
    kind: str, skip: bool, dtype: torch.dtype, passed_on: list[str]
) -> None:
    exact = dtype == torch.bfloat16 and kind != "topk"  # there gates sit on rounded sums
    made = one_layer(kind, dtype, skip=skip, exact=exact)
    x = inputs(dtype, N, D, exact=exact)
    if kind == "topk" and dtype == torch.bfloat16:
        x, made = distinct_pre_acts(made)
    with torch.no_grad():
        calls = single_calls(made, x)
        expected = {name: call() for name, call in calls.items()}
        assert 0.01 < float((expected["encode"] != 0).float().mean()) < 0.25
        assert len(passed_on) > 8
        with circuit_tracer.install():
            passed_on.clear()
            for name, call in calls.items():
                same(call(), expected[name], name)
            assert passed_on == []


def distinct_pre_acts(made: Any) -> tuple[Tensor, Any]:
    """One-hot inputs into columns of distinct numbers: no bfloat16 ties for a TopK."""
    with torch.no_grad():
        for row in made.W_enc.t():
            row.copy_((torch.randperm(F).float() - F + 40) / 8)
        made.b_enc.zero_()
    return torch.eye(D).repeat(2, 1)[:N].to(made.dtype), made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_cross_layer_is_the_hosts(
    kind: str, skip: bool, dtype: torch.dtype, passed_on: list[str]
) -> None:
    exact = dtype == torch.bfloat16
    made = cross_layer(kind, dtype, skip=skip, exact=exact)
    x = inputs(dtype, L, N, D, exact=exact)
    with torch.no_grad():
        calls = cross_calls(made, x)
        expected = {name: call() for name, call in calls.items()}
        assert 0.01 < float((expected["encode"] != 0).float().mean()) < 0.25
        with circuit_tracer.install():
            passed_on.clear()
            for name, call in calls.items():
                same(call(), expected[name], name)
            assert passed_on == []


def test_attribution_components_of_a_set(passed_on: list[str]) -> None:
    kinds = ["relu", "jumprelu", "relu"]
    layers = {i: one_layer(kind, skip=True) for i, kind in enumerate(kinds)}
    made = single.TranscoderSet(layers, "in", "out")
    x = torch.randn(L, N, D)
    with torch.no_grad():
        expected = made.compute_attribution_components(x, slice(0, 4))
        dense = made.encode(x)
        passed_on.clear()
        with circuit_tracer.accelerate(SimpleNamespace(transcoders=made)):
            same(made.compute_attribution_components(x, slice(0, 4)), expected)
            same(made.encode(x), dense)
            same(made.encode_layer(x[2], 2), dense[2])
            assert passed_on == []
        made.encode(x)
        assert passed_on == ["encode"] * L
    assert not expected["activation_matrix"].to_dense()[:, :4].any()


# ---- gradients


def gradients(made: Any, x: Tensor, call: Callable[[], Any]) -> dict[str, Tensor]:
    """Of a random combination of all that a call returns, by parameter and for x."""
    x.grad = None
    made.zero_grad()
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for out in tree_leaves(call()):
        values = out.values() if out.is_sparse else out
        if values.is_floating_point() and values.requires_grad:
            total = total + (values * torch.randn(values.shape, generator=generator)).sum()
    total.backward()
    named = {"x": x.grad} | {name: p.grad for name, p in made.named_parameters()}
    return {name: g.clone() for name, g in named.items() if g is not None}


IN_PLACE = ("encode_sparse", "zero_positions", "both ways", "components")
"""Calls that zero the output of a ReLU in place, which the host cannot differentiate."""


@pytest.mark.parametrize("kind", ["relu", "jumprelu", TOPK])
def test_gradients_of_one_layer_are_the_hosts(kind: str, passed_on: list[str]) -> None:
    made = one_layer(kind, skip=True)
    x = torch.randn(N, D, requires_grad=True)
    calls = single_calls(made, x)
    calls["both ways"] = lambda: made.decode_sparse(made.encode_sparse(x)[0], x)
    calls = {k: v for k, v in calls.items() if kind != "relu" or k not in IN_PLACE}
    expected = {name: gradients(made, x, call) for name, call in calls.items()}
    assert ("activation_function.threshold" in expected["forward"]) == (kind == "jumprelu")
    with circuit_tracer.install():
        passed_on.clear()
        for name, call in calls.items():
            same(gradients(made, x, call), expected[name], name)
        assert passed_on == []


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_gradients_of_a_cross_layer_one_are_the_hosts(kind: str, passed_on: list[str]) -> None:
    made = cross_layer(kind)
    if kind == "jumprelu":  # the host's own has the wrong shape for `encode`
        made.activation_function.threshold.requires_grad_(False)
    x = torch.randn(L, N, D, requires_grad=True)
    calls = cross_calls(made, x)
    calls["both ways"] = lambda: made.decode(made.encode_sparse(x)[0], x)
    calls = {k: v for k, v in calls.items() if kind != "relu" or k not in IN_PLACE}
    expected = {name: gradients(made, x, call) for name, call in calls.items()}
    with circuit_tracer.install():
        passed_on.clear()
        for name, call in calls.items():
            same(gradients(made, x, call), expected[name], name)
        assert passed_on == []


def test_decode_differentiates_latents_that_are_off(passed_on: list[str]) -> None:
    made = one_layer("relu")
    acts = made.encode(torch.randn(N, D)).detach().requires_grad_()
    expected = torch.autograd.grad(made.decode(acts).square().sum(), acts)[0]
    with circuit_tracer.install():
        found = torch.autograd.grad(made.decode(acts).square().sum(), acts)[0]
    assert (expected[acts == 0] != 0).any() and torch.equal(found, expected)


# ---- lazy weights


class Reads:
    """Reads of safetensors files by tensor: None for a whole one, else the number of rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int | None]] = []
        for module in (single, cross):
            monkeypatch.setattr(module, "safe_open", self._open(module.safe_open))

    def _open(self, stock: Any) -> Any:
        reads = self.seen

        class Slice:
            def __init__(self, name: str, inner: Any) -> None:
                self.name, self.inner = name, inner

            def __getitem__(self, rows: Any) -> Tensor:
                reads.append((self.name, len(rows) if isinstance(rows, Tensor) else None))
                return self.inner[rows]

        class Open:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.manager = stock(*args, **kwargs)

            def __enter__(self) -> Open:
                self.file = self.manager.__enter__()
                return self

            def __exit__(self, *args: Any) -> None:
                self.manager.__exit__(*args)

            def get_tensor(self, name: str) -> Tensor:
                reads.append((name, None))
                return self.file.get_tensor(name)

            def get_slice(self, name: str) -> Slice:
                return Slice(name, self.file.get_slice(name))

        return Open

    def __call__(self, call: Callable[[], Any]) -> list[tuple[str, int | None]]:
        self.seen.clear()
        with torch.no_grad():
            call()
        return list(self.seen)


def test_a_lazy_layer_is_read_once_and_by_active_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: list[str]
) -> None:
    kept = one_layer("jumprelu", skip=True)
    kept.to_safetensors(str(tmp_path / "layer.safetensors"))
    load = getattr(single, "load_transcoder", None) or single.load_relu_transcoder
    lazy = load(str(tmp_path / "layer.safetensors"), 0, device=torch.device("cpu"))
    assert lazy.lazy_encoder and lazy.lazy_decoder
    x, reads = torch.randn(N, D), Reads(monkeypatch)
    with torch.no_grad():
        dense, found = kept.encode(x), kept.encode_sparse(x)[0]
        expected = {name: call() for name, call in single_calls(kept, x).items()}
    active, later = (int((f != 0).any(0).sum()) for f in (dense, found.to_dense()))
    assert later < len(found.values()) and active < F
    with circuit_tracer.install():
        passed_on.clear()
        assert reads(lambda: lazy.encode(x)) == [("W_enc", None)]
        assert reads(lambda: lazy.encode_sparse(x)) == [("W_enc", None)]
        assert reads(lambda: lazy.decode(dense, x)) == [("W_dec", active)]
        assert reads(lambda: lazy.decode_sparse(found, x)) == [("W_dec", later)]
        assert reads(lambda: lazy(x)) == [("W_enc", None), ("W_dec", active)]
        with torch.no_grad():
            for name, call in single_calls(lazy, x).items():
                same(call(), expected[name], name)
        assert passed_on == []
    assert reads(lambda: lazy.decode(dense, x)) == [("W_dec", None)]  # as the host has it


def test_a_lazy_cross_layer_one_is_read_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: list[str]
) -> None:
    kept = cross_layer("jumprelu")
    kept.to_safetensors(str(tmp_path))
    options = {"lazy_encoder": True, "lazy_decoder": True, "dtype": torch.float32}
    lazy = cross.load_clt(str(tmp_path), device=torch.device("cpu"), **options)
    x, reads = torch.randn(L, N, D), Reads(monkeypatch)
    with torch.no_grad():
        found = kept.encode_sparse(x)[0]
        expected = {name: call() for name, call in cross_calls(kept, x).items()}
    rows = (found.to_dense() != 0).any(1).sum(1).tolist()
    encoders = [(f"W_enc_{i}", None) for i in range(L)]
    decoders = [(f"W_dec_{i}", rows[i]) for i in range(L)]
    with circuit_tracer.install():
        passed_on.clear()
        assert reads(lambda: lazy.encode(x)) == encoders
        assert reads(lambda: lazy.encode_layer(x[1], 1)) == encoders[1:2]
        assert reads(lambda: lazy.encode_sparse(x)) == encoders
        assert reads(lambda: lazy.decode(found)) == decoders
        assert reads(lambda: lazy.select_decoder_vectors(found)) == decoders
        with torch.no_grad():
            for name, call in cross_calls(lazy, x).items():
                same(call(), expected[name], name)
        assert passed_on == []


@pytest.mark.parametrize("empty", [None, 0, 1], ids=str)
def test_gradients_and_lazy_decoders_change_no_bit(empty: int | None, tmp_path: Path) -> None:
    """bfloat16: in memory or lazy, under autograd or not, also where a layer has no entries."""
    kept = cross_layer("relu", torch.bfloat16)
    with torch.no_grad():
        kept.b_enc.sub_(0 if empty is None else 100 * (torch.arange(L) == empty)[:, None])
    kept.to_safetensors(str(tmp_path))
    lazy = cross.load_clt(str(tmp_path), device=torch.device("cpu"))
    x = torch.randn(L, N, D, dtype=torch.bfloat16)
    whole = slice(0, 0)
    with circuit_tracer.install():
        outs = [made.decode(made.encode(x)) for made in (kept, lazy)]
        with torch.no_grad():
            outs += [made.decode(made.encode(x)) for made in (kept, lazy)]
            outs.append(lazy(x))
            outs.append(lazy.compute_attribution_components(x, whole)["reconstruction"])
    grads = []
    for out in outs[:2]:
        (gradient,) = torch.autograd.grad(
            out.square().sum(), [kept.b_enc if out is outs[0] else lazy.b_enc]
        )
        grads.append(gradient)
    assert all(torch.equal(out, outs[0]) for out in outs) and outs[0].std() > 0.1
    assert torch.equal(*grads) and grads[0].any()


# ---- memory


class Largest(TorchDispatchMode):
    """`bytes`: of the largest storage that an operation made."""

    def __init__(self, *outside: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self.outside = {t.untyped_storage()._cdata for t in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                if t.untyped_storage()._cdata not in self.outside:
                    self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def largest(call: Callable[[], Any], *outside: Tensor) -> int:
    with torch.no_grad(), Largest(*outside) as seen:
        call()
    return seen.bytes


def test_no_tensor_of_n_times_d_sae_on_the_way() -> None:
    n, d, d_sae = 512, 8, 8192
    one = single.SingleLayerTranscoder(
        d, d_sae, torch.nn.functional.relu, 0, device="cpu", dtype=torch.float32
    )
    many = cross.CrossLayerTranscoder(
        2, d_sae, d, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        for p in [*one.parameters(), *many.parameters()]:
            p.normal_()
        one.b_enc.sub_(10)
        many.b_enc.sub_(10)
    x = torch.randn(2, n, d)
    outside = (x, *one.parameters(), *many.parameters())
    found, features = one.encode_sparse(x[0])[0].detach(), many.encode_sparse(x)[0].detach()
    calls: dict[str, Callable[[], Any]] = {
        "encode_sparse": lambda: one.encode_sparse(x[0]),
        "decode_sparse": lambda: one.decode_sparse(found.coalesce()),
        "forward": lambda: one(x[0]),
        "cross encode_sparse": lambda: many.encode_sparse(x),
        "cross decode": lambda: many.decode(features.coalesce()),
        "cross forward": lambda: many(x),
        "components": lambda: many.compute_attribution_components(x),
    }
    dense = 4 * n * d_sae
    stock = {name: largest(call, *outside) for name, call in calls.items()}
    assert all(stock[name] >= dense for name in calls if "decode" not in name), stock
    with circuit_tracer.install():
        sizes = {name: largest(call, *outside) for name, call in calls.items()}
        assert all(0 < size < dense / 8 for size in sizes.values()), sizes
        assert largest(lambda: one.encode(x[0]), *outside) == dense
        assert largest(lambda: many.encode(x), *outside) == 2 * dense
        acts = one.encode(x[0])
        assert largest(lambda: one.decode(acts), *outside, acts) < dense / 8


# ---- what is left to the host


def test_what_is_not_served_is_the_hosts(passed_on: list[str]) -> None:
    x, many_x = torch.randn(N, D), torch.randn(L, N, D)
    bad = x.clone()
    bad[3, 2] = torch.inf
    odd, half, float64, wide = (one_layer("jumprelu") for _ in range(4))
    odd.activation_function = torch.nn.GELU()
    float64.double()
    half.half()
    wide.activation_function.threshold.data = wide.activation_function.threshold.data.double()
    crowded = one_layer("relu")
    crowded.b_enc.data.add_(2.0)
    hooked = one_layer("jumprelu")
    seen: list[Tensor] = []
    hooked.activation_function.register_forward_hook(lambda m, i, out: seen.append(out))
    plain = one_layer("jumprelu")
    dense = plain.encode(x)
    cases: dict[str, tuple[Callable[[], Any], str]] = {
        "pre-activations": (lambda: plain.encode(x, False), "encode"),
        "infinite input": (lambda: plain.encode(bad), "encode"),
        "an index of positions": (lambda: plain.encode_sparse(x, [0, 2]), "encode_sparse"),
        "another activation": (lambda: odd.encode(x), "encode"),
        "float16": (lambda: half.encode(x), "encode"),
        "float64": (lambda: float64.encode(x), "encode"),
        "a wider threshold": (lambda: wide.encode(x), "encode"),
        "half of all active": (lambda: crowded.encode(x), "encode"),
        "a hook": (lambda: hooked.encode(x), "encode"),
        "dense acts of another dtype": (lambda: plain.decode(crowded.encode(x)), "decode"),
        "cross-layer, infinite": (
            lambda: cross_layer("relu").encode(torch.full_like(many_x, torch.inf)),
            "encode",
        ),
    }
    with torch.no_grad(), circuit_tracer.install():
        for name, (call, method) in cases.items():
            passed_on.clear()
            torch.manual_seed(1)
            call()
            assert method in passed_on, name
        assert len(seen) == 1
        with torch.autocast("cpu", torch.bfloat16):
            passed_on.clear()
            plain.encode(x)
            assert passed_on == ["encode"]
        found = plain.encode(bad)
        circuit_tracer.uninstall()
        torch.testing.assert_close(found, plain.encode(bad), equal_nan=True)
    assert torch.equal(dense, plain.encode(x))


def test_the_hosts_errors_stay() -> None:
    skip = one_layer("relu", skip=True)
    clt = cross_layer("relu", skip=True)
    x = torch.randn(N, D)
    empty = torch.zeros(L, N, F).to_sparse()
    with torch.no_grad(), circuit_tracer.install():
        found = skip.encode_sparse(x)[0]
        with pytest.raises(AssertionError, match="no input_acts were provided"):
            skip.decode_sparse(found)
        with pytest.raises(AssertionError, match="no input_acts were provided"):
            skip.decode(skip.encode(x))
        with pytest.raises(AssertionError, match="no input_acts were provided"):
            clt(torch.randn(L, N, D))
        with pytest.raises(RuntimeError):
            skip.encode(torch.randn(N, D + 1))
        with pytest.raises((RuntimeError, ValueError), match="non-empty list"):
            clt.decode(empty)


def test_methods_of_a_subclass_or_an_instance_stay_in_charge(passed_on: list[str]) -> None:
    class Doubled(single.SingleLayerTranscoder):  # type: ignore[misc]
        def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
            return 2 * super().encode(input_acts, apply_activation_function)

    made = Doubled(D, F, torch.nn.functional.relu, 0, device="cpu", dtype=torch.float32)
    other = one_layer("relu")
    fill(made, False)
    x = torch.randn(N, D)
    with torch.no_grad():
        expected = made(x)
        vectors = other._get_decoder_vectors
        with circuit_tracer.install():
            same(made(x), expected)
            other._get_decoder_vectors = lambda ids: 3 * vectors(ids)
            recon, scaled = other.decode_sparse(other.encode_sparse(x)[0])
            passed_on.clear()
            other.decode_sparse(other.encode_sparse(x)[0])
            assert passed_on == ["decode_sparse"]
        del other._get_decoder_vectors
        same(scaled, 3 * other.decode_sparse(other.encode_sparse(x)[0])[1])


# ---- install, uninstall, accelerate


def test_install_and_uninstall_restore_everything() -> None:
    stock = {kind: {name: vars(kind)[name] for name in names} for kind, names in CLASSES.items()}
    changes = circuit_tracer.install()
    assert circuit_tracer.install() is changes
    for kind, methods in stock.items():
        for name, method in methods.items():
            ours = vars(kind)[name]
            assert ours is not method and ours.__name__ == method.__name__
            assert ours.__wrapped__ is method
    circuit_tracer.uninstall()
    circuit_tracer.uninstall()
    assert all(vars(k)[n] is m for k, methods in stock.items() for n, m in methods.items())
    with pytest.raises(KeyError), circuit_tracer.install():
        raise KeyError
    assert all(vars(k)[n] is m for k, methods in stock.items() for n, m in methods.items())


def test_accelerate_serves_one_instance(passed_on: list[str]) -> None:
    made, other = one_layer("jumprelu"), one_layer("jumprelu")
    x = torch.randn(N, D)
    with torch.no_grad():
        expected = made(x)
        with (
            circuit_tracer.accelerate(made),
            circuit_tracer.install(),
            circuit_tracer.accelerate(made),
        ):
            pass
        passed_on.clear()
        changes = circuit_tracer.accelerate(made)
        same(made(x), expected)
        assert passed_on == []
        other(x)
        assert passed_on == ["forward", "encode", "decode"]
        twin = pickle.loads(pickle.dumps(made))
        same(twin(x), expected)
        same(copy.deepcopy(made)(x), expected)
        changes.undo()
        assert not set(SINGLE) & set(vars(made))
    clt = cross_layer("relu")
    with circuit_tracer.accelerate(SimpleNamespace(transcoders=SimpleNamespace(_module=clt))):
        assert set(CROSS) <= set(vars(clt))
    assert not set(CROSS) & set(vars(clt))
    with pytest.raises(TypeError, match="or ReplacementModel, got Linear"):
        circuit_tracer.accelerate(torch.nn.Linear(2, 2))


def test_weights_edited_in_place_count(passed_on: list[str]) -> None:
    made = one_layer("jumprelu")
    x = torch.randn(N, D)
    with torch.no_grad(), circuit_tracer.accelerate(made):
        before = made(x)
        made.W_enc.data.mul_(1.5)
        made.activation_function.threshold.data.add_(0.5)
        found = made(x)
    with torch.no_grad():
        same(found, made(x))
    assert not torch.equal(found, before)


def test_files_stay_the_hosts(tmp_path: Path) -> None:
    made = one_layer("jumprelu")
    made.to_safetensors(str(tmp_path / "stock.safetensors"))
    with circuit_tracer.accelerate(made):
        made.to_safetensors(str(tmp_path / "ours.safetensors"))
        assert set(made.state_dict()) == set(one_layer("jumprelu").state_dict())
    stock, ours = (tmp_path / f"{name}.safetensors" for name in ("stock", "ours"))
    assert stock.read_bytes() == ours.read_bytes()
