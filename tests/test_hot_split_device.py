"""The hot/cold split of sae_backward on a GPU: products against the pass and the reference."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gemmascope_fast import ops, reference

DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")
NAMES = ("d_x", "d_W_enc", "d_b_enc", "d_threshold", "d_W_dec", "d_b_dec")
BANDWIDTH = 0.5


def absent() -> str:
    if not DEVICE.startswith("cuda"):
        return "needs GEMMASCOPE_FAST_TEST_DEVICE=cuda"
    if ops.implementation("sae_backward", "cuda") != "native":
        return "no compiled CUDA backward"
    return "" if torch.cuda.get_device_capability() == (9, 0) else "not compute capability 9.0"


pytestmark = pytest.mark.skipif(bool(absent()), reason=absent())


def rates(firing: str, d_sae: int, l0: float) -> Tensor:
    weights = torch.ones(d_sae)
    if firing == "log-normal":
        weights = (2 * torch.randn(d_sae, generator=torch.Generator().manual_seed(0))).exp()
    found = (weights * (l0 / weights.sum())).clamp(max=0.5)
    if firing == "one latent":
        found = found.clamp(max=0.01)
        found[d_sae // 2] = 1.0
    return torch.zeros(d_sae) if firing == "empty" else found


def draw(
    n: int,
    d_in: int,
    d_sae: int,
    d_out: int,
    firing: str,
    dtype: torch.dtype = torch.bfloat16,
    l0: float | None = None,
) -> list[Any]:
    """Arguments of sae_backward on the device, entries of the given rates."""
    g = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE)

    fires = torch.rand(n, d_sae, generator=g, device=DEVICE)
    fires = fires < rates(firing, d_sae, l0 or d_sae / 32).to(DEVICE)
    rows, latents = fires.nonzero(as_tuple=True)
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=DEVICE)
    offsets[1:] = fires.sum(1).cumsum(0)
    indices, nnz = latents.int(), rows.shape[0]
    gate = (torch.rand(nnz, generator=g, device=DEVICE) > 0.1).float()
    values = gate * (0.6 + torch.rand(nnz, generator=g, device=DEVICE))
    threshold = torch.full((d_sae,), 0.5, device=DEVICE)
    W_enc = (normal(d_sae, d_in) / d_in**0.5).to(dtype).t()
    inputs = [
        normal(n, d_in).to(dtype),
        W_enc,
        threshold,
        BANDWIDTH,
        normal(d_sae, d_out).to(dtype),
    ]
    d_recon = (normal(1, n, d_out) / n).to(dtype)
    view = reference.by_feature(offsets, indices, d_sae)
    entries = [offsets, indices, values, gate, normal(nnz) / n, normal(nnz) / n, *view]
    return [*inputs, d_recon, [d_sae], *entries, True]


def backward(args: list[Any], split: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setenv("GEMMASCOPE_FAST_SPLIT", split)
    return dict(zip(NAMES, torch.ops.gemmascope_fast.sae_backward(*args), strict=True))


def assert_close(ours: dict[str, Tensor], args: list[Any]) -> None:
    """To 2^-15 of what is summed, and a rounding to the gradient's dtype."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    sizes = [a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in wide]
    truths, scales = reference.sae_backward(*wide), reference.sae_backward(*sizes)
    for name, truth, scale in zip(NAMES, truths, scales, strict=True):
        mine = ours[name]
        bound = 2.0**-15 * scale.abs() + 0.51 * torch.finfo(mine.dtype).eps * truth.abs()
        assert torch.equal(mine.isnan(), truth.isnan()), name
        worst = ((mine.double() - truth).abs() - bound).nan_to_num(0.0, 0.0, 0.0)
        assert float(worst.max()) <= 1e-12, name


@pytest.mark.parametrize("firing", ["uniform", "log-normal", "one latent", "empty"])
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "d_out"),
    [(1, 64, 40, 64), (300, 264, 1000, 640), (1000, 1152, 600, 1152), (1025, 5376, 2000, 72)],
)
def test_gradients(
    n: int, d_in: int, d_sae: int, d_out: int, firing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = draw(n, d_in, d_sae, d_out, firing)
    split, passed = (backward(args, mode, monkeypatch) for mode in ("always", "never"))
    assert_close(split, args)
    assert_close(passed, args)
    if n > 1 and firing != "empty":
        assert not torch.equal(split["d_b_enc"], passed["d_b_enc"]), "the pass served all latents"
    again = backward(args, "always", monkeypatch)
    for name in NAMES:
        assert torch.equal(split[name], again[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 4, 5])  # x, W_dec, d_recon
def test_what_is_not_finite_reaches_only_its_entries(
    where: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = draw(300, 264, 1000, 640, "log-normal")
    counts = args[13].diff()
    matrix = args[where][0] if where == 5 else args[where]
    row = int(counts.argmax()) if where == 4 else 17
    matrix[row, 3] = value
    split = backward(args, "always", monkeypatch)
    assert_close(split, args)
    assert bool(split["d_W_dec"].isfinite().all(1)[counts == 0].all())


def test_nested_groups_and_other_dtypes_are_left_to_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = draw(300, 264, 1000, 640, "log-normal")
    nested = [*args[:5], args[5].repeat(2, 1, 1), [100, 1000], *args[7:]]
    for some in (nested, draw(300, 264, 1000, 640, "log-normal", torch.float32)):
        split, passed = (backward(some, mode, monkeypatch) for mode in ("always", "never"))
        assert_close(split, some)
        for name in NAMES:
            assert torch.equal(split[name], passed[name]), name


def test_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    args = draw(300, 264, 1000, 640, "log-normal")
    eager = backward(args, "always", monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(args, "always", monkeypatch)
    for _ in range(2):
        graph.replay()
    for name in NAMES:
        assert torch.equal(captured[name], eager[name]), name


def test_the_choice_is_made_by_the_firing_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for firing, wanted in (("uniform", False), ("log-normal", True)):
        args = draw(8192, 5376, 16384, 5376, firing, l0=64)
        args[15] = False
        automatic, passed = (backward(args, mode, monkeypatch) for mode in ("", "never"))
        split = not torch.equal(automatic["d_b_enc"], passed["d_b_enc"])
        assert split is wanted, firing
        torch.testing.assert_close(automatic["d_b_enc"], passed["d_b_enc"], atol=1e-6, rtol=1e-3)


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    args = draw(10, 64, 40, 64, "uniform")
    with pytest.raises(RuntimeError, match="GEMMASCOPE_FAST_SPLIT=often: expected always or never"):
        backward(args, "often", monkeypatch)
