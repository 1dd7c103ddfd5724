"""`integrations.circuit_tracer` against circuit-tracer's own transcoders: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip(
    "circuit_tracer",
    reason="circuit-tracer is not installed: pip install "
    "git+https://github.com/decoderesearch/circuit-tracer@v0.5.0",
)
from circuit_tracer.transcoder import single_layer_transcoder as single  # noqa: E402
from circuit_tracer_hosts import (  # noqa: E402, F401
    TOPK,
    D,
    F,
    L,
    N,
    cross_calls,
    cross_layer,
    inputs,
    one_layer,
    passed_on,
    restored,
    same,
    single_calls,
)

from gemmascope_fast.integrations import circuit_tracer  # noqa: E402

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
