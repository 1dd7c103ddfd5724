"""Sizes beyond 2^31 elements, for real: positions are 64-bit all the way."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops

pytestmark = pytest.mark.skipif(
    bool(ops.NATIVE_MISSING), reason="the reference would form the whole matrix"
)


def test_more_than_2_31_pairs_of_token_and_latent():
    n, d_sae = 2100, 2**20 + 3
    assert n * d_sae > 2**31
    x, W = torch.zeros(n, 2), torch.zeros(d_sae, 2)
    x[0, 0] = x[-1, 1] = 1
    W[[5, d_sae - 1], 0] = torch.tensor([2.0, 3.0])
    W[[7, d_sae - 2], 1] = torch.tensor([4.0, 5.0])
    zeros = torch.zeros(d_sae)
    for acts in (
        gsf.jumprelu_encode(x, W.t(), zeros, zeros + 1),
        gsf.batchtopk_encode(x, W.t(), zeros, 4 / n),
    ):
        assert acts.tokens().tolist() == [0, 0, n - 1, n - 1]
        assert acts.indices.tolist() == [5, d_sae - 1, 7, d_sae - 2]
        assert acts.values.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_weights_of_more_than_2_31_elements():
    d, d_sae = 2056, 2**20 + 3
    assert d * d_sae > 2**31
    W = torch.zeros(d_sae, d, dtype=torch.bfloat16)  # pages nobody writes cost nothing
    W[d_sae - 1] = 1
    W[11, 3] = 2
    W.requires_grad_()
    x = torch.ones(2, d)
    zeros = torch.zeros(d_sae)
    acts = gsf.jumprelu_encode(x, W.detach().t(), zeros, zeros + 1)
    assert acts.indices.tolist() == [11, d_sae - 1] * 2
    assert acts.values.tolist() == [2.0, float(d)] * 2
    recon = gsf.decode(acts, W)
    expected = torch.full((d,), float(d))
    expected[3] += 4
    assert torch.equal(recon, expected.bfloat16().expand(2, d))
    recon[0].sum().backward()
    touched = W.grad[[11, d_sae - 1]].float()
    assert torch.equal(
        touched, torch.tensor([2.0, float(d)]).bfloat16().float()[:, None].expand(2, d)
    )
    assert not W.grad[12].any()
