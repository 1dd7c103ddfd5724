"""Gemma Scope files: what `load` returns, and that saving and loading keep every bit."""

import numpy as np
import pytest
import torch
from attacks import arrays
from attacks.published import CONFIG, UPPER, scope_1, scope_2
from safetensors.numpy import load_file

from gemmascope_fast import SAE, BatchTopK, JumpReLU, TopK, Transcoder, load, ops
from gemmascope_fast.artefacts import validate

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")


def filled(module):
    """Random values everywhere, thresholds of every sign."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def dense(tensors, x):
    """The published maths in float64: strict gate, no b_dec subtraction, x @ A."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    pre = x.astype(np.float64) @ t["w_enc"] + t["b_enc"]
    y = np.where(pre > t["threshold"], pre, 0) @ t["w_dec"] + t["b_dec"]
    skip = t.get("affine_skip_connection")
    return y if skip is None else y + x.astype(np.float64) @ skip


def assert_same_encode(a, b, x):
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ours, theirs = a.encode(x), b.encode(x)
        for field in ("offsets", "indices", "values", "gate"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


def assert_parameters(module, tensors):
    names = {**UPPER, "affine_skip_connection": "W_skip"}
    for name, array in tensors.items():
        assert torch.equal(getattr(module, names[name]).detach(), torch.from_numpy(array)), name


@pytest.mark.filterwarnings("ignore:float16 overflows")
@pytest.mark.parametrize(
    "module",
    [
        SAE(24, 100, JumpReLU(bandwidth=0.001)),
        SAE(24, 100, d_out=7),
        Transcoder(24, 100, affine=True),
        Transcoder(24, 100, d_out=7, affine=True),
        Transcoder(24, 100, d_out=7),
        SAE(1, 1),
        SAE(17, 33, dtype=torch.bfloat16),
        Transcoder(16, 32, affine=True, dtype=torch.float16),
        SAE(5, 9, dtype=torch.float64),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.d_in}-{m.d_sae}-{m.d_out}-{m.W_enc.dtype}",
)
def test_a_saved_module_loads_bit_for_bit(module, tmp_path):
    filled(module).save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert type(loaded) is type(module)
    assert isinstance(loaded.activation, JumpReLU)
    ours, theirs = module.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype and torch.equal(theirs[name], value), name
        assert theirs[name].stride() == value.stride(), name
    assert_same_encode(module, loaded, torch.randn(50, module.d_in).to(module.W_enc.dtype))


def test_special_floats_survive(tmp_path):
    module = filled(SAE(4, 8))
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4e38, 1.17549435e-38, 1.0])
    with torch.no_grad():
        module.threshold.copy_(odd)
        module.W_enc[2].copy_(odd)
    module.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, value in module.state_dict().items():
        bits = (t.contiguous().view(torch.int32) for t in (value, loaded.state_dict()[name]))
        assert torch.equal(*bits), name


def test_a_published_folder(tmp_path):
    tensors = arrays()
    module = load(scope_2(tmp_path / "f", tensors, **CONFIG))
    assert type(module) is SAE
    assert module.activation == JumpReLU(bandwidth=0.001)
    assert (module.d_in, module.d_sae, module.d_out) == (6, 10, 6)
    assert_parameters(module, tensors)
    assert module.W_enc.t().is_contiguous() and module.W_dec.is_contiguous()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    x = np.random.default_rng(1).standard_normal((30, 6)).astype(np.float32)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), dense(tensors, x), atol=1e-5)


@pytest.mark.parametrize("d_out", [6, 4])
def test_the_skip_is_x_times_A(d_out, tmp_path):
    """Square and not symmetric, where a transpose would go unnoticed; and not square."""
    tensors = arrays(d_out=d_out)
    skip = np.random.default_rng(2).standard_normal((6, d_out)).astype(np.float32)
    tensors["affine_skip_connection"] = skip
    config = CONFIG | {"type": "transcoder", "affine_connection": True}
    module = load(scope_2(tmp_path / "f", tensors, **config))
    assert type(module) is Transcoder
    assert_parameters(module, tensors)
    x = np.random.default_rng(1).standard_normal((30, 6)).astype(np.float32)
    expected = dense(tensors, x)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), expected, atol=1e-5)
    if d_out == 6:
        wrong = dense(tensors | {"affine_skip_connection": skip.T}, x)
        assert np.abs(wrong - expected).max() > 1
    module.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "params.safetensors")
    assert stored.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("direct", [True, False])
def test_gemma_scope_1(save, direct, tmp_path):
    tensors = arrays()
    path = scope_1(tmp_path / "params.npz", tensors, save)
    module = load(path if direct else tmp_path)
    assert type(module) is SAE
    assert_parameters(module, tensors)
    assert module.W_enc.t().is_contiguous()


def test_npz_orders_and_widths(tmp_path):
    """Fortran order, the other byte order, float16 and float64 all mean the same numbers."""
    tensors = {name: t.astype(np.float16).astype(np.float32) for name, t in arrays().items()}
    stored = {
        "w_enc": np.asfortranarray(tensors["w_enc"]),
        "w_dec": np.asfortranarray(tensors["w_dec"].astype(">f8")),
        "b_enc": tensors["b_enc"].astype(">f4"),
        "b_dec": tensors["b_dec"].astype(np.float16),
        "threshold": tensors["threshold"].astype(np.float64),
    }
    path = scope_1(tmp_path / "params.npz", stored)
    with pytest.raises(ValueError, match="dtypes torch.float32, torch.float64: choose one"):
        load(path)
    module = load(path, dtype=torch.float32)
    assert_parameters(module, tensors)
    wide = {name: t.astype(np.float64) for name, t in arrays().items()}
    assert load(scope_1(tmp_path / "b.npz", wide)).W_enc.dtype == torch.float32
    assert_parameters(load(tmp_path / "b.npz"), arrays())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", [1, 2])
def test_dtype_converts_the_matrices_only(dtype, format, tmp_path):
    tensors = arrays() | {"threshold": np.full(10, 1.00001, np.float32)}
    if format == 1:
        module = load(scope_1(tmp_path / "params.npz", tensors), dtype=dtype)
    else:
        module = load(scope_2(tmp_path / "f", tensors), dtype=dtype)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    for name, array in tensors.items():
        expected = torch.from_numpy(array).to(dtype if name.startswith("w_") else narrow)
        got = getattr(module, UPPER[name])
        assert got.dtype == expected.dtype and torch.equal(got, expected), name


def test_saving_in_another_dtype(tmp_path):
    module = filled(SAE(8, 20))
    module.save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = load(tmp_path)
    assert loaded.W_enc.dtype == torch.bfloat16 and loaded.threshold.dtype == torch.float32
    assert torch.equal(loaded.W_enc, module.W_enc.bfloat16())
    assert torch.equal(loaded.threshold, module.threshold)


def test_values_beyond_a_narrow_dtype_are_refused(tmp_path):
    tensors = arrays()
    tensors["w_dec"][0, 0] = 70_000
    folder = scope_2(tmp_path / "f", tensors)
    with pytest.raises(ValueError, match="w_dec has values beyond the range of torch.float16"):
        load(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="W_dec has values beyond the range of torch.float16"):
        load(folder).save_pretrained(tmp_path / "g", dtype=torch.float16)
    assert not (tmp_path / "g").exists()


def test_blocks_cover_every_row(tmp_path, monkeypatch):
    """Blocks of 16 rows: 40 rows need three, the last one partial."""
    monkeypatch.setattr(validate, "BLOCK_BYTES", 1)
    tensors = arrays(40, 70, 33) | {"affine_skip_connection": arrays(40, 33)["w_enc"]}
    folder = scope_2(tmp_path / "f", tensors)
    module = load(folder)
    assert_parameters(module, tensors)
    module.save_pretrained(tmp_path / "g")
    assert_parameters(load(tmp_path / "g"), tensors)
    del tensors["affine_skip_connection"]
    stored = tensors | {"w_enc": np.asfortranarray(tensors["w_enc"])}
    assert_parameters(load(scope_1(tmp_path / "params.npz", stored)), tensors)


def test_class_methods(tmp_path):
    filled(SAE(6, 10)).save_pretrained(tmp_path / "s")
    filled(Transcoder(6, 10)).save_pretrained(tmp_path / "t")
    assert type(SAE.from_pretrained(tmp_path / "s", dtype=torch.bfloat16)) is SAE
    assert type(Transcoder.from_pretrained(str(tmp_path / "t"), device="cpu")) is Transcoder
    with pytest.raises(ValueError, match="SAE.from_pretrained: .* holds a Transcoder"):
        SAE.from_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match="Transcoder.from_pretrained: .* holds a SAE"):
        Transcoder.from_pretrained(tmp_path / "s")


def test_loading_leaves_the_random_state_alone(tmp_path):
    folder = scope_2(tmp_path, arrays())
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(2.5)])
def test_only_jumprelu_has_a_file(activation, tmp_path):
    with pytest.raises(ValueError, match=r"JumpReLU only, got .*TopK\(k=.*state_dict"):
        SAE(6, 10, activation).save_pretrained(tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_backend_is_what_serves_or_an_error(tmp_path):
    folder = scope_2(tmp_path, arrays())
    serving = ops.implementation("jumprelu_encode", "cpu")
    other = "triton" if serving != "triton" else "native"
    for streamed in (False, True):
        assert load(folder, backend=serving, streamed=streamed).d_sae == 10
        with pytest.raises(
            ValueError, match=f"backend='{other}' does not serve .*{serving} does: s"
        ):
            load(folder, backend=other, streamed=streamed)
        with pytest.raises(ValueError, match="backend must be None or one of reference, triton, n"):
            load(folder, backend="cuda", streamed=streamed)
    assert load(folder, backend="reference", dtype=torch.float64).d_sae == 10
    with pytest.raises(
        ValueError, match="backend='triton' does not serve .* of torch.float64 on cpu"
    ):
        SAE.from_pretrained(folder, backend="triton", dtype=torch.float64)


@pytest.mark.parametrize("d_sae", [97, 10_080 // 16])
def test_a_transcoder_of_gemma_scope_1(d_sae, tmp_path):
    """Widths that are multiples of nothing; the kind is in the path."""
    tensors = arrays(13, d_sae, 7)
    path = tmp_path / "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_41/params.npz"
    module = load(scope_1(path, tensors))
    assert type(module) is Transcoder and module.metadata == {"l0": 41}
    assert_parameters(module, tensors)
    x = np.random.default_rng(1).standard_normal((30, 13)).astype(np.float32)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), dense(tensors, x), 1e-5, 1e-4)
