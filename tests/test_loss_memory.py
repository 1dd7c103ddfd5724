"""`SAE.loss` keeps memory bounded at a dense start, and hands its gradients out without copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import native_absent
from test_loss import OPS, TERMS
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gemmascope_fast as gsf
from gemmascope_fast.training.blocked import sae_loss
from gemmascope_fast.training.planning import Limits

ABSENT = native_absent(OPS)
sparse_memory = pytest.mark.skipif(bool(ABSENT), reason=f"the reference is dense inside; {ABSENT}")


class Allocations(TorchDispatchMode):
    """`peak`: most bytes that results of operations held at once, inputs from outside excluded."""

    def __init__(self, *outside: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.outside = {t.untyped_storage()._cdata for t in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.outside:
                storage = t.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        live = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.storages = live
        self.peak = max(self.peak, sum(size for _, size in live.values()))
        return out


def unit_rows(n: int, d: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d), dim=1)


def peak_of_a_step(module: gsf.SAE, x: Tensor, limits: Limits) -> tuple[int, dict[str, Tensor]]:
    with Allocations(x, *module.parameters()) as allocations:
        loss, metrics = sae_loss(module, x, None, TERMS, limits)
        loss.backward()
    return allocations.peak, metrics


def gradient_bytes(module: gsf.SAE) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_a_dense_start_holds_three_tiles_and_the_gradients() -> None:
    n, d, d_sae, tile = 512, 16, 2048, 1 << 17
    module, x = gsf.SAE(d, d_sae), unit_rows(n, d)
    peak, metrics = peak_of_a_step(module, x, Limits(tile_bytes=tile, crossover=1 / 8))
    assert metrics["dense_blocks"] == metrics["blocks"] == n * d_sae * 4 // tile
    assert metrics["density"] > 0.4
    small = 16 * d_sae * 4 + 4 * n * d * 4  # vectors over the latents; n x d tensors
    assert peak <= gradient_bytes(module) + 3 * tile + small
    assert peak < 0.15 * 2 * n * d_sae * 4  # of the two dense matrices of an unblocked step


@sparse_memory
def test_sparse_blocks_hold_their_budget_and_the_gradients_twice() -> None:
    n, d, d_sae, budget = 2048, 16, 1024, 1 << 19
    module, x = gsf.SAE(d, d_sae), unit_rows(n, d)
    peak, metrics = peak_of_a_step(module, x, Limits(entry_bytes=budget, crossover=1.0))
    assert metrics["dense_blocks"] == 0 and metrics["blocks"] > 60
    small = 16 * d_sae * 4 + 4 * n * d * 4
    assert peak <= 2 * gradient_bytes(module) + 1.2 * budget + small


@sparse_memory
def test_one_sparse_block_and_its_backward_do_not_copy_gradients() -> None:
    module, x = gsf.SAE(256, 4096, gsf.TopK(4)), unit_rows(16, 256)
    peak, metrics = peak_of_a_step(module, x, Limits())
    assert metrics["blocks"] == 1
    assert peak <= 1.05 * gradient_bytes(module)


PEAK_RSS = """
import resource, torch, gemmascope_fast as gsf
n, d, d_sae = 4096, 32, 16384
module = gsf.SAE(d, d_sae)
x = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
module.loss(x[:8])[0].backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss, metrics = module.loss(x)
loss.backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, float(metrics["density"]))
"""


def test_resident_memory_at_a_dense_start(run_python: Callable[..., str]) -> None:
    """The whole process, what the allocator keeps included, with the default limits."""
    kib, density = (float(v) for v in run_python(PEAK_RSS).split())
    assert density > 0.4
    assert kib * 1024 < 0.5 * 2 * 4096 * 16384 * 4
