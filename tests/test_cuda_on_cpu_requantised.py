"""Codes of weights that train: after each step of the CUDA kernels, those of packing anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import fused_sparse_step_args, problem
from test_cuda_fused_sparse_step import fused, testing
from test_fused_sparse_step import W_DEC, W_ENC

screened = testing.cuda_screened
DTYPES = [torch.float32, torch.bfloat16]


def rows_of(W_enc: torch.Tensor) -> np.ndarray:
    return W_enc.t().float().contiguous().numpy()


@pytest.mark.parametrize(("beta1", "tail"), [(0.0, 0), (0.5, 2), (0.5, 2**62)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [144, 256])
def test_codes_after_steps_are_those_of_packing_anew(beta1, tail, dtype, d):
    p = problem(n=2, d_in=d, d_sae=61, d_out=24, x_dtype=dtype, w_dtype=dtype)
    p = p.with_(threshold=(p.x @ p.W_enc + p.b_enc).float().quantile(0.9).expand(61).clone())
    center = np.linspace(-1, 1, d, dtype=np.float32)
    args = fused_sparse_step_args(p, beta1, "8bit", tail)
    code = DTYPES.index(dtype)
    *held, _ = screened.quantise(rows_of(args[W_ENC]), code, d, center, True)
    resting = 0
    for step in range(1, 6):
        before = args[W_ENC].clone()
        x = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        fresh = fused_sparse_step_args(p.with_(x=x), beta1, "8bit", tail)
        args[:W_ENC], args[5:15] = fresh[:W_ENC], fresh[5:15]
        args[19][0] = args[20][0] = step
        results = fused(args)
        args[W_ENC], args[W_DEC] = results[2:4]
        args[15], args[16] = results[4:8], results[8:12]
        touched_at = args[15][3].numpy()
        rows = rows_of(args[W_ENC])
        assert screened.requantise(rows, code, center, *held, touched_at, step, tail) == 0
        anew = screened.quantise(rows, code, d, center, True)
        for ours, wanted in zip(held, anew[:3], strict=True):
            assert (ours.view(np.uint8) == wanted.view(np.uint8)).all()
        moved = (args[W_ENC] != before).any(0)
        assert moved.any()
        resting += int((~moved).sum())
    assert resting > 0
