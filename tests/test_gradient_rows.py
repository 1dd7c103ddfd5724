"""Weight gradients larger than the caches: each row is written once, zeros where no token was."""

from __future__ import annotations

import pytest
import torch
from conftest import native_absent

OPS = ("decode_backward", "encode_backward")
N, L0 = 48, 24
VARIANTS = ("generic", "avx2", "avx512", "neon")
SHAPES = {torch.float32: (4100, 1030), torch.bfloat16: (8200, 1051), torch.float16: (8200, 1024)}
"""More than 16 MiB; rows of 4120 and 2102 bytes begin at any place of a line, those of 2048 at
its start."""


def compare(dtype: torch.dtype) -> None:
    """Both weight gradients of whole numbers, without rounding, against the dense product."""
    d_sae, d = SHAPES[dtype]
    assert d_sae * d * dtype.itemsize > 16 << 20 and N * L0 > d_sae / 8
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(d_sae)[:L0].sort().values for _ in range(N)])
    indices[:, 0] = torch.arange(N) % 3  # three latents with 16 entries each
    csr = (torch.arange(0, N * L0 + 1, L0), indices.flatten().int())
    values, gate = torch.randint(-2, 3, (N * L0,)).float(), torch.ones(N * L0)
    g = torch.randint(-2, 3, (N, d)).to(dtype)
    W = torch.randn(d_sae, d).to(dtype)
    dense = torch.zeros(N, d_sae).scatter_add_(1, indices, values.view(N, L0))
    wanted = (dense.t() @ g.float()).to(dtype)
    assert 0.1 < float((wanted == 0).all(1).float().mean()) < 1
    ops = torch.ops.gemmascope_fast
    needs = (None, None, False, True, False)
    decoder = ops.decode_backward(g, *csr, values, W, *needs)[1]
    args = (values, None, g, W.t(), None, 0.0, *csr, values, gate, *needs[:4], False, False)
    encoder = ops.encode_backward(*args)[1]
    for found in (decoder, encoder.t()):
        assert found.is_contiguous() and torch.equal(found, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_is_written_into_dirty_memory(variant, run_python):
    if reason := native_absent(OPS):
        pytest.skip(reason)
    testing = pytest.importorskip("gemmascope_fast._testing")
    if variant != "generic":
        target = getattr(testing.SimdTarget, variant)
        if not testing.simd_target_available(target):
            pytest.skip(f"{variant}: not on this processor")
    code = "import torch, test_gradient_rows as t\nfor d in t.SHAPES: t.compare(d)\nprint('same')"
    env = {"GEMMASCOPE_FAST_CPU": variant, "MALLOC_PERTURB_": "165"}
    assert run_python(code, **env).strip() == "same"
