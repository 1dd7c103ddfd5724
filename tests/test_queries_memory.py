"""No query allocates a tensor of the size of `[n, d_sae]`, or a second decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import native_absent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gemmascope_fast as gsf
from gemmascope_fast import queries

ABSENT = native_absent(("jumprelu_encode", "topk_encode", "decode"))
N, D, LATENTS = 512, 16, 16384


class Largest(TorchDispatchMode):
    """`elements`: of the largest storage that an operation made, views of old ones excluded."""

    def __init__(self, *outside: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.outside = {t.untyped_storage()._cdata for t in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                if storage._cdata not in self.outside:
                    self.elements = max(self.elements, storage.nbytes() // t.element_size())
        return out


def largest(module: gsf.SAE, x: Tensor, query: Callable[[], object]) -> int:
    with torch.no_grad(), Largest(x, *module.parameters()) as seen:
        query()
    return seen.elements


@pytest.fixture(scope="module", params=[gsf.JumpReLU(init_threshold=2.6), gsf.TopK(30)], ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[gsf.SAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = gsf.SAE(D, LATENTS, request.param, generator=generator)
    return module, torch.randn(N, D, generator=generator)


@pytest.mark.skipif(bool(ABSENT), reason=f"the reference is dense inside; {ABSENT}")
def test_no_query_has_a_tensor_of_n_times_d_sae(problem: tuple[gsf.SAE, Tensor]) -> None:
    module, x = problem
    bound, few = N * LATENTS // 10, [5, 900, 16000]
    acts = module.encode(x).detach()
    assert 5 * N < acts.nnz < bound // 10
    calls: list[Callable[[], object]] = [
        lambda: queries.top_latents(acts, 10),
        lambda: queries.top_per_token(acts, 5),
        lambda: queries.activations_of(acts, few),
        lambda: queries.to_sparse_coo(acts),
        lambda: queries.encode_latents(module, x, few),
        lambda: queries.encode_coo(module, x, unique=True),
        lambda: queries.steering_vector(module, few),
        lambda: queries.cosine_topk(module.W_dec, module.W_dec[:3], 10),
        lambda: queries.TopActivations(LATENTS, 5).update(acts),
    ]
    sizes = [largest(module, x, call) for call in calls]
    assert 0 < min(sizes) and max(sizes) < bound, dict(enumerate(sizes))
    assert largest(module, x, acts.to_dense) == N * LATENTS  # what the bound would catch


def test_weights_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries.rows, "BLOCK", 2**14)
    module = gsf.SAE(64, 4096, dtype=torch.bfloat16)
    x = torch.zeros(0, 64)
    cosines = largest(module, x, lambda: queries.cosine_topk(module.W_dec, torch.ones(3, 64), 7))
    assert 0 < cosines <= 2**14
    folding = largest(module, x, lambda: queries.fold_decoder_norm(module))
    assert 0 < folding <= 2**14
