"""Inputs that an adversarial review broke the library with."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gemmascope_fast as gsf
from gemmascope_fast.training import Reconstruction
from gemmascope_fast.training.losses import Term
from gemmascope_fast.training.planning import _strata, sampled_density

X, W, B = torch.randn(6, 20), torch.randn(20, 40), torch.zeros(40)
THETA = torch.full((40,), 1.0)


# ---- module.loss: the density sample


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096, 8192, 65536, 10080])
def test_sample_takes_one_index_per_stratum_and_no_fixed_stride(size):
    chosen = _strata(size, 64)
    width = math.ceil(size / 64)
    assert torch.equal(chosen // width, torch.arange(math.ceil(size / width)))
    assert bool((chosen < size).all())
    if width >= 64:
        assert chosen.remainder(width).unique().numel() > 32


def test_first_tokens_of_sequences_do_not_decide_the_path():
    torch.manual_seed(0)
    x = torch.randn(4096, 16)
    x[::256] *= 100  # BOS-like rows: half of all latents fire on them
    sae = gsf.SAE(16, 2048, gsf.JumpReLU(bandwidth=0.05, init_threshold=2.6))
    _, metrics = sae.loss(x)
    assert float(metrics["density"]) < 1 / 16
    assert int(metrics["dense_blocks"]) == 0


def test_silent_first_tokens_do_not_unbound_the_blocks():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(8192, 8), dim=1)
    x[::512] = 0
    sae = gsf.SAE(8, 1024, gsf.JumpReLU(0.001, 0.001))
    _, metrics = sae.loss(x)
    assert int(metrics["dense_blocks"]) == int(metrics["blocks"]) > 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an op returned in memory of its own."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)]
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("latent_major", [True, False])
@pytest.mark.parametrize("d_sae", [2048, 4096])
def test_the_sample_of_the_density_reads_at_most_the_latents_it_needs(d_sae, latent_major):
    torch.manual_seed(0)
    x, W_enc = torch.randn(256, 128), torch.randn(d_sae, 128)
    b_enc, limit = torch.randn(d_sae), 4 * torch.randn(d_sae)
    exact = float((x @ W_enc.t() + b_enc > limit).float().mean())
    W_enc = W_enc.t() if latent_major else W_enc.t().contiguous()
    with Largest() as seen:
        found = sampled_density(x, W_enc, b_enc, limit)
    assert abs(found - exact) < 0.05 * exact
    assert seen.elements == 2048 * (64 if d_sae == 2048 else 128)  # no copy where all are sampled


# ---- derivatives


def test_forward_mode_is_refused_instead_of_zero():
    acts, W_dec = gsf.topk_encode(X, W, B, 3), torch.randn(40, 12)
    with pytest.raises(NotImplementedError, match="decode: forward-mode"):
        torch.func.jvp(lambda w: gsf.decode(acts, w), (W_dec,), (W_dec,))
    with pytest.raises(NotImplementedError, match="topk_encode: forward-mode"):
        torch.func.jvp(lambda x: gsf.topk_encode(x, W, B, 3).values, (X,), (X,))


def test_reference_with_padding_and_no_latents():
    theta = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(4, 0, dtype=torch.float64)
    acts = gsf.jumprelu_encode(
        torch.randn(3, 4, dtype=torch.float64), empty, theta.detach(), theta, bandwidth=1, max_nnz=5
    )
    (grad,) = torch.autograd.grad(acts.l0().sum() + acts.values.sum(), theta)
    assert grad.shape == (0,)


# ---- from_topk


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_from_topk_takes_small_integers_with_many_latents(dtype):
    indices = torch.tensor([[5, 9]]).to(dtype)
    acts = gsf.SparseActs.from_topk(torch.ones(1, 2), indices, 2**31 - 1)
    assert acts.indices.tolist() == [5, 9]


@pytest.mark.parametrize(
    ("values", "indices", "d_sae", "error", "match"),
    [
        ([[1.0]], torch.tensor([[1]]), 4, TypeError, "values must be a torch.Tensor, got list"),
        (torch.ones(1, 1), [[1]], 4, TypeError, "indices must be a torch.Tensor, got list"),
        (torch.ones(1, 1), torch.tensor([[1]]), 10.5, TypeError, "d_sae must be an int, got float"),
        (torch.ones(1, 1), torch.tensor([[1]]), 2**33, ValueError, r"d_sae must be in \[0, 2\^31"),
    ],
)
def test_from_topk_names_what_is_wrong(values, indices, d_sae, error, match):
    with pytest.raises(error, match=match):
        gsf.SparseActs.from_topk(values, indices, d_sae)


# ---- dtypes


def test_decode_writes_float64_from_float32():
    sae = gsf.SAE(8, 16, gsf.TopK(3))
    acts = sae.encode(torch.randn(4, 8))
    wide = sae.decode(acts, dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, sae.decode(acts).double())
    wide.sum().backward()
    assert sae.W_dec.grad.dtype == torch.float32


def test_rounding_a_float64_module_leaves_float32_vectors():
    sae = gsf.SAE(8, 16).double().bfloat16()
    assert sae.W_enc.dtype == torch.bfloat16
    assert {t.dtype for t in (sae.b_enc, sae.b_dec, sae.threshold)} == {torch.float32}
    assert sae.encode(torch.randn(2, 8)).values.dtype == torch.float32


# ---- arguments


def encode(**changes):
    return gsf.jumprelu_encode(X, W, B, THETA, **changes)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: encode(bandwidth="a"), TypeError, "bandwidth must be a number, got str"),
        (lambda: encode(bandwidth=None), TypeError, "bandwidth must be a number, got NoneType"),
        (lambda: encode(bandwidth=10**400), ValueError, "bandwidth must be finite and >= 0"),
        (lambda: encode(max_nnz=2**63), ValueError, r"max_nnz must be below 2\^63"),
        (lambda: gsf.batchtopk_encode(X, W, B, 10**400), ValueError, "k must be finite"),
        (lambda: gsf.batchtopk_encode(X, W, B, 2, guess="a"), TypeError, "guess must be a number"),
        (lambda: gsf.topk_encode(X.to_sparse(), W, B, 3), TypeError, "x must be a dense"),
        (lambda: gsf.topk_encode(X, W, B, 3).topk(2.5), TypeError, "topk: k must be an int"),
        (lambda: gsf.topk_encode(X, W, B, 3).topk(True), TypeError, "topk: k must be an int"),
        (lambda: gsf.topk_encode(X, W, B, 3).union(X), TypeError, "other must be a SparseActs"),
        (lambda: gsf.topk_encode(X, W, B, 3).to(torch.int32), TypeError, "dtype must be floating"),
        (lambda: gsf.TopK(True), TypeError, "TopK: k must be an int"),
        (lambda: gsf.TopK(2.5), TypeError, "TopK: k must be an int"),
        (lambda: gsf.BatchTopK(True), TypeError, "BatchTopK: k must be a number"),
        (lambda: gsf.JumpReLU("a"), TypeError, "JumpReLU: bandwidth must be a number"),
    ],
)
def test_errors_name_op_argument_and_expectation(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_meta_tensors_give_shapes():
    acts = gsf.topk_encode(X.to("meta"), W.to("meta"), B.to("meta"), 3)
    assert acts.values.shape == (18,) and acts.values.is_meta


class Named(Term):
    def __init__(self, name, coefficient=1.0):
        self.name = name
        self.coefficient = coefficient

    def per_token(self, statistics):
        return self.coefficient * statistics.l0


@pytest.mark.parametrize("name", ["fvu", "l0", "density", "blocks", "dense_blocks", 3, None])
def test_terms_may_not_take_the_names_of_metrics(name):
    with pytest.raises(ValueError, match="Named.name must be a string other than"):
        gsf.SAE(20, 40).loss(X, terms=[Reconstruction(), Named(name)])


def test_terms_hold_constants():
    lam = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="Named holds a tensor that requires grad"):
        gsf.SAE(20, 40).loss(X, terms=[Named("mine", lam)])
