"""`torch.set_default_device` of another device: what is on the CPU stays there.

The meta device stands for a GPU: whatever followed the default would have no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_same
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import sources

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 12, generator=GENERATOR)
SMALL: dict[str, Any] = {"d_sae": 40, "steps": 3, "batch_size": 32, "progress": False}


def module(**options: Any) -> gsf.SAE:
    g = torch.Generator().manual_seed(1)
    return gsf.SAE(12, 40, gsf.JumpReLU(0.2, 1.2), generator=g, device="cpu", **options)


def learn(sae: gsf.SAE, fused: bool) -> list[Tensor]:
    optimizer = gsf.optim.Adam(sae, 1e-2, fused=fused, moments="8bit")
    for _ in range(2):
        optimizer.zero_grad()
        loss, metrics = sae.loss(X)
        loss.backward()
        gsf.clip_grad_norm_(sae.parameters() if not fused else [], 0.1)
        optimizer.step()
    return [loss.detach(), *metrics.values(), *(p.detach() for p in sae.parameters())]


def loaded(folder: Path, format: str, **options: Any) -> list[Tensor]:
    semantics = "sparsify_1_3" if format == "sparsify" else "gemma_scope_2"
    made = module(semantics=semantics)
    if format == "sparsify":
        made.activation = gsf.TopK(4)
    made.save_pretrained(folder, format=format)
    return [p.detach() for p in gsf.load(folder, device="cpu", **options).parameters()]


def trained(source: Any, **options: Any) -> list[Tensor]:
    return [p.detach() for p in gsf.train(source, device="cpu", **SMALL, **options).parameters()]


def resumed(folder: Path) -> list[Tensor]:
    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"target_l0": 4, "out": folder, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(X, on_metrics=stop, **options)
    return trained(X, **options)


def sharded(folder: Path) -> list[Tensor]:
    sources.write_shards(folder / "shards", [X, X + 1])
    return trained(folder / "shards", target_l0=4)


def looked_at(folder: Path) -> list[Tensor]:
    sae, acts = module(), module().encode(X)
    found = gsf.evaluate(sae, X)
    audit = gsf.audit(acts, X, sae.W_enc, sae.b_enc, threshold=sae.threshold)
    assert gsf.explain().path != "" and audit.missed == 0
    top = gsf.queries.top_per_token(acts, k=3)
    dense = acts.set([3], 2.0)[5:].topk(2).to_dense()
    return [torch.tensor([found.fvu, found.l0], device="cpu"), found.counts, top[0], dense.detach()]


RUNS: dict[str, Callable[[Path], list[Tensor]]] = {
    "loss": lambda _: learn(module(), fused=False),
    "loss, fused": lambda _: learn(module(), fused=True),
    "files": lambda folder: loaded(folder, "gemma_scope_2"),
    "a part of a file": lambda folder: loaded(folder, "gemma_scope_2", latents=slice(3, 30)),
    "SAELens": lambda folder: loaded(folder, "saelens"),
    "sparsify": lambda folder: loaded(folder, "sparsify"),
    "train": lambda folder: trained(X, target_l0=4, out=folder / "run"),
    "train, resumed": resumed,
    "train, topk": lambda _: trained(X, activation="topk", k=4),
    "train, batchtopk": lambda folder: trained(X, activation="batchtopk", k=4, out=folder / "run"),
    "shards": sharded,
    "evaluate, audit, queries": looked_at,
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_on_the_cpu_follows_the_default_device(name: str, tmp_path: Path) -> None:
    expected = RUNS[name](tmp_path / "a")
    with torch.device("meta"):
        found = RUNS[name](tmp_path / "b")
    assert found and len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
