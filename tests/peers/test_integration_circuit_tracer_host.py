"""What `integrations.circuit_tracer` leaves to circuit-tracer, and how it goes away again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "circuit_tracer",
    reason="circuit-tracer is not installed: pip install "
    "git+https://github.com/decoderesearch/circuit-tracer@v0.5.0",
)
from circuit_tracer.transcoder import single_layer_transcoder as single  # noqa: E402
from circuit_tracer_hosts import (  # noqa: E402, F401
    CLASSES,
    CROSS,
    SINGLE,
    D,
    F,
    L,
    N,
    activation,
    cross_layer,
    fill,
    one_layer,
    passed_on,
    restored,
    same,
)

from gemmascope_fast.integrations import circuit_tracer  # noqa: E402

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
    circuit_tracer.install()
    with circuit_tracer.install():  # a second one adds nothing, and takes nothing away
        pass
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
