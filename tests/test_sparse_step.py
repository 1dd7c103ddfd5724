"""SparseActs in a training step: one feature-major view, straight-through gradients, capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same
from samples import problem
from torch.utils._python_dispatch import TorchDispatchMode

import gemmascope_fast as gsf
from gemmascope_fast import CapacityError

OPS = ("jumprelu_encode", "topk_encode", "decode", "decode_backward", "encode_backward")


class Recorder(TorchDispatchMode):
    """Names and arguments of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("gemmascope_fast"):
            self.calls.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_one_feature_view_serves_a_whole_step(backend: Any, kind: str) -> None:
    if backend.name == "device":
        pytest.skip("tensors are copied between the test and the device")
    p = problem().leaves()
    with Recorder() as recorder:
        if kind == "topk":
            acts = gsf.topk_encode(*p.encoder, 4)
        else:
            acts = gsf.jumprelu_encode(*p.encoder, p.threshold, bandwidth=0.4)
        gsf.decode(acts, p.W_dec, p.b_dec).square().sum().backward()
    names = [name for name, _ in recorder.calls]
    assert names == [f"{kind}_encode", "decode", "decode_backward", "encode_backward"]
    by_name = dict(recorder.calls)
    assert by_name[f"{kind}_encode"][-1] is True
    view = [t.data_ptr() for t in acts.by_feature()]
    for name, at in (("decode", 5), ("decode_backward", 5), ("encode_backward", 10)):
        assert [t.data_ptr() for t in by_name[name][at : at + 2]] == view, name
    assert [name for name, _ in recorder.calls].count("by_feature") == 0


def test_inference_computes_no_feature_view(backend: Any) -> None:
    p = problem()
    with Recorder() as recorder:
        acts = gsf.topk_encode(*p.encoder, 4)
        gsf.decode(acts, p.W_dec, p.b_dec)
    assert [name for name, _ in recorder.calls] == ["topk_encode", "decode"]
    assert recorder.calls[0][1][-1] is False and acts.feature_offsets is None


@pytest.mark.parametrize("max_nnz", [None, 13 * 37])
def test_l0_and_counts_differentiate_in_the_threshold(backend: Any, max_nnz: int | None) -> None:
    p, bandwidth = problem(integer=True), 2.0
    threshold = p.threshold.clone().requires_grad_()
    acts = gsf.jumprelu_encode(*p.encoder, threshold, bandwidth=bandwidth, max_nnz=max_nnz)
    pre = p.x @ p.W_enc + p.b_enc
    window = ((pre - threshold) / bandwidth).abs() < 0.5
    assert int((window & (pre <= threshold)).sum()) > 5
    per_token, per_latent = torch.arange(13.0), torch.arange(37.0) - 18
    (found,) = torch.autograd.grad(acts.l0(), threshold, per_token, retain_graph=True)
    assert_same(found, -(window * per_token[:, None]).sum(0) / bandwidth)
    (found,) = torch.autograd.grad(acts.counts(), threshold, per_latent)
    assert_same(found, -window.sum(0) * per_latent / bandwidth)
    assert_same(acts.l0().detach(), (pre > threshold).sum(1).float())
    assert_same(acts.counts().detach(), (pre > threshold).sum(0).float())


def test_overflow_names_the_needed_capacity(backend: Any) -> None:
    p = problem()
    needed = gsf.jumprelu_encode(*p.encoder, p.threshold).nnz
    text = rf"{needed} entries are needed.*max_nnz >= {needed}$"
    with pytest.raises(CapacityError, match=text):
        gsf.jumprelu_encode(*p.encoder, p.threshold, max_nnz=needed - 1).check()
    acts = gsf.jumprelu_encode(*p.encoder, p.threshold, max_nnz=needed)
    assert acts.check().nnz == needed == int(acts.needed)
