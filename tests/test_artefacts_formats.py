"""The formats of SAELens and sparsify: what is written, read back, and refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_artefacts_saving import failing

import gemmascope_fast as gsf
from gemmascope_fast import cli
from gemmascope_fast.artefacts import files, validate

SAELENS, SPARSIFY = "sae_weights.safetensors", "sae.safetensors"


def made(cls=gsf.SAE, activation=None, semantics="gemma_scope_2", dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(1)
    module = cls(6, 20, activation, semantics=semantics, dtype=dtype, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        if module.threshold is not None:
            module.threshold.abs_()
    return module


SAELENS_MODULES = {
    "jumprelu": made(),
    "centred": made(semantics="saelens_6"),
    "bfloat16": made(dtype=torch.bfloat16),
    "float64": made(dtype=torch.float64),
    "topk": made(activation=gsf.TopK(5)),
    "topk_rescaled": made(activation=gsf.TopK(5), semantics="saelens_6"),
    "transcoder": made(gsf.Transcoder, d_out=4),
    "skip": made(gsf.Transcoder, d_out=4, affine=True),
    "square_skip": made(gsf.Transcoder, affine=True),
}
SPARSIFY_MODULES = {
    "sae": made(activation=gsf.TopK(5), semantics="sparsify_1_3"),
    "float64": made(activation=gsf.TopK(5), semantics="sparsify_1_3", dtype=torch.float64),
    "transcoder": made(gsf.Transcoder, gsf.TopK(5)),
    "skip": made(gsf.Transcoder, gsf.TopK(5), affine=True),
}
CASES = [("saelens", name) for name in SAELENS_MODULES]
CASES += [("sparsify", name) for name in SPARSIFY_MODULES]


def module_of(format, name):
    return (SAELENS_MODULES if format == "saelens" else SPARSIFY_MODULES)[name]


@torch.no_grad()
@pytest.mark.parametrize("format, name", CASES)
def test_what_is_written_is_read_back(format, name, tmp_path, monkeypatch):
    """The same bits, in several blocks, and the same outputs."""
    monkeypatch.setattr(validate, "BLOCK_BYTES", 1)
    module = module_of(format, name)
    module.metadata = {"l0": 7, "model_name": "m", "hf_hook_point_in": "model.layers.3.output"}
    module.save_pretrained(tmp_path, format=format)
    found = gsf.load(tmp_path)
    assert type(found) is type(module) and found.activation == module.activation
    state = module.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in found.state_dict().items())
    assert found.W_enc.t().is_contiguous() and found.W_dec.is_contiguous()
    x = torch.randn(30, 6).to(module.W_enc.dtype)
    assert torch.equal(found(x), module(x))
    assert {k: found.metadata[k] for k in module.metadata} == module.metadata


@pytest.mark.parametrize("format, name", CASES)
def test_a_range_of_latents_in_another_dtype(format, name, tmp_path):
    module = module_of(format, name)
    module.save_pretrained(tmp_path, format=format)
    found = gsf.load(tmp_path, latents=slice(3, 17), dtype=torch.bfloat16)
    assert torch.equal(found.W_enc, module.W_enc[:, 3:17].bfloat16())
    assert torch.equal(found.W_dec, module.W_dec[3:17].bfloat16())
    assert torch.equal(found.b_enc, module.b_enc[3:17].float())


def test_fewer_latents_than_k(tmp_path):
    """A part decodes, and is a part of a mesh; alone it has too few to select from."""
    SAELENS_MODULES["topk"].save_pretrained(tmp_path, format="saelens")
    found = gsf.load(tmp_path, latents=slice(0, 4))
    assert found.activation == gsf.TopK(5)
    with pytest.raises(ValueError, match=r"topk_encode: k must be in \[0, d_sae=4\], got 5"):
        found.encode(torch.zeros(1, 6))
    with pytest.raises(ValueError, match=r"^SAE: k must be in \[0, d_sae=4\], got 5"):
        found.activation = gsf.TopK(5)


def test_tensors_and_config_of_saelens(tmp_path):
    module = SAELENS_MODULES["skip"]
    module.metadata = {"hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output"}
    module.save_pretrained(tmp_path, format="saelens", dtype=torch.bfloat16, l0=9)
    found = load_file(tmp_path / SAELENS)
    assert {name: (list(t.shape), t.dtype) for name, t in found.items()} == {
        "W_enc": ([6, 20], torch.bfloat16),
        "W_dec": ([20, 4], torch.bfloat16),
        "W_skip": ([4, 6], torch.bfloat16),
        "b_enc": ([20], torch.float32),
        "b_dec": ([4], torch.float32),
        "threshold": ([20], torch.float32),
    }
    assert torch.equal(found["W_skip"].t(), module.W_skip.bfloat16())
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "architecture": "jumprelu_skip_transcoder",
        "d_in": 6,
        "d_sae": 20,
        "d_out": 4,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
            "hook_name": "blocks.3.hook_mlp_in",
            "l0": 9,
        },
    }


def test_tensors_and_config_of_sparsify(tmp_path):
    module = made(activation=gsf.TopK(5), dtype=torch.bfloat16)
    module.save_pretrained(tmp_path, format="sparsify", l0=5)
    found = load_file(tmp_path / SPARSIFY)
    assert {name: (list(t.shape), t.dtype) for name, t in found.items()} == {
        "encoder.weight": ([20, 6], torch.float32),
        "encoder.bias": ([20], torch.float32),
        "W_dec": ([20, 6], torch.float32),
        "b_dec": ([6], torch.float32),
    }
    shift = module.b_dec.double() @ module.W_enc.double()  # x - b_dec is what sparsify encodes
    torch.testing.assert_close(found["encoder.bias"], module.b_enc + shift.float())
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": False,
        "num_latents": 20,
        "k": 5,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": 6,
        "l0": 5,
    }


@torch.no_grad()
def test_a_gate_that_is_not_strict(tmp_path):
    """Pre-activations on the threshold pass, 0 included, whose value is 0 either way."""
    module = made(semantics=gsf.Semantics(gate="non_strict"))
    module.W_enc.zero_()
    module.threshold[:10] = 0.0
    module.b_enc.copy_(module.threshold)
    module.save_pretrained(tmp_path, format="saelens")
    assert load_file(tmp_path / SAELENS)["threshold"].min() == 0.0
    found = gsf.load(tmp_path).eval()
    dense = found.encode(torch.zeros(1, 6)).to_dense()
    assert torch.equal(dense[0], module.threshold)


# ---- refused: the library would compute something else


@pytest.mark.parametrize(
    "format, make, message",
    [
        ("saelens", lambda: gsf.Crosscoder(2, 4, 8), "SAELens has no Crosscoder"),
        ("saelens", lambda: made(gsf.Transcoder, gsf.TopK(3)), "no transcoder with TopK"),
        ("saelens", lambda: made(activation=gsf.BatchTopK(3)), "save module.to_jumprelu"),
        ("saelens", lambda: made(d_out=4), "has one width, got d_in=6 and d_out=4"),
        ("sparsify", lambda: gsf.CrossLayerTranscoder(2, 4, 8), "has no CrossLayerTranscoder"),
        ("sparsify", lambda: made(), "sparsify has TopK only, got JumpReLU"),
        (
            "sparsify",
            lambda: made(activation=gsf.TopK(3), semantics="saelens_6"),
            "not rescaled by decoder norms",
        ),
        ("sparsify", lambda: made(gsf.Transcoder, gsf.TopK(3), d_out=4), "has one width"),
        ("gemma_scope_2", lambda: made(activation=gsf.TopK(3)), "hold JumpReLU only"),
        ("onnx", lambda: made(), "format must be one of gemma_scope_2, saelens, sparsify, got"),
    ],
)
def test_modules_that_a_format_cannot_hold(format, make, message, tmp_path):
    with pytest.raises(ValueError, match=f"save_pretrained: .*{message}"):
        make().save_pretrained(tmp_path / "f", format=format)
    assert os.listdir(tmp_path) == []


def test_thresholds_that_saelens_would_rectify(tmp_path):
    module = made()
    with torch.no_grad():
        module.threshold[7] = -0.5
    with pytest.raises(ValueError, match=r">= 0, got -0.5 for latent 7 \(1 are negative\)"):
        module.save_pretrained(tmp_path / "f", format="saelens")


def test_a_skip_that_an_sae_ignores(tmp_path):
    for format, activation in (("saelens", None), ("sparsify", gsf.TopK(3))):
        module = made(activation=activation)
        module.W_skip = torch.nn.Parameter(torch.ones(6, 6))
        with pytest.raises(ValueError, match="W_skip"):
            module.save_pretrained(tmp_path / "f", format=format)


# ---- one change of two files


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 1])
def test_a_crash_leaves_no_config_beside_other_tensors(at, tmp_path, monkeypatch):
    """The libraries refuse a folder without a config; ours finds it in the tensors' header."""
    old, new = made(activation=gsf.TopK(3)), made(activation=gsf.TopK(4))
    new.b_enc.add_(1)
    for module in (old, new):
        module.metadata = {"l0": module.activation.k}
    old.save_pretrained(tmp_path, format="saelens")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, at, OSError("no")))
        with pytest.raises(OSError, match="no"):
            new.save_pretrained(tmp_path, format="saelens")
    assert os.listdir(tmp_path) == [SAELENS]
    found, expected = gsf.load(tmp_path), (old, new)[at]
    assert found.activation == expected.activation and found.metadata["l0"] == found.activation.k
    assert torch.equal(found.b_enc, expected.b_enc)
    new.save_pretrained(tmp_path, format="saelens")
    assert sorted(os.listdir(tmp_path)) == ["cfg.json", SAELENS]


@pytest.mark.parametrize("seen", [True, False])
def test_a_config_that_a_save_removes_while_it_is_read(seen, tmp_path, monkeypatch):
    """Just after it was found, and just before."""
    made(activation=gsf.TopK(3)).save_pretrained(tmp_path, format="saelens")
    name, step = ("regular", files.regular) if seen else ("lexists", os.path.lexists)

    def then_removed(path):
        found = step(path)
        if os.path.basename(path) == "cfg.json":
            monkeypatch.undo()
            os.unlink(path)
        return found

    monkeypatch.setattr(files if seen else os.path, name, then_removed)
    assert gsf.load(tmp_path).activation == gsf.TopK(3)
    assert os.listdir(tmp_path) == [SAELENS]


# ---- read


def saelens(folder, **config):
    """A folder as SAELens writes it."""
    module = SAELENS_MODULES["jumprelu"]
    tensors = {n: t.detach().contiguous() for n, t in module.state_dict().items()}
    base = {"architecture": "jumprelu", "d_in": 6, "d_sae": 20, "apply_b_dec_to_input": False}
    base["metadata"] = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"}
    config = {key: value for key, value in (base | config).items() if value is not ...}
    if config.get("architecture") != "jumprelu":
        tensors.pop("threshold")
    save_file(tensors, folder / SAELENS)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    "config, center, activation",
    [
        ({"architecture": "standard"}, False, "relu"),
        ({"architecture": "standard", "apply_b_dec_to_input": ...}, True, "relu"),
        ({"architecture": "topk", "k": 4}, False, "topk"),
        ({"architecture": ..., "metadata": ..., "apply_b_dec_to_input": ...}, True, "relu"),
        (
            {
                "architecture": ...,
                "metadata": ...,
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 4},
                "normalize_activations": None,
                "hook_name": "blocks.3.hook_resid_post",
            },
            False,
            "topk",
        ),
    ],
)
def test_other_classes_and_older_configs_of_saelens(config, center, activation, tmp_path):
    """Against the formula, which is the library's, written out."""
    module, x = gsf.load(saelens(tmp_path, **config)), torch.randn(9, 6)
    pre = ((x - module.b_dec if center else x) @ module.W_enc + module.b_enc).relu()
    if activation == "topk":
        values, indices = pre.topk(4)
        pre = torch.zeros_like(pre).scatter(1, indices, values)
    torch.testing.assert_close(module.encode(x).to_dense(), pre)
    torch.testing.assert_close(module(x), pre @ module.W_dec + module.b_dec)


def test_negative_thresholds_of_saelens_rectify(tmp_path):
    folder = saelens(tmp_path)
    tensors = load_file(folder / SAELENS)
    tensors["threshold"][:5] = -1.0
    save_file(tensors, folder / SAELENS)
    module, x = gsf.load(folder), torch.randn(9, 6)
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    expected = pre.relu() * (pre > tensors["threshold"])
    torch.testing.assert_close(module.encode(x).to_dense(), expected)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "gated"}, "architecture must be one of standard, jumprelu, topk"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations must be none, got"),
        ({"d_in": 7}, r"W_enc must be floating point of shape \[7, 20\]"),
        ({"d_sae": "20"}, r"d_sae must be an int in \[1, "),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input must be true or false, got 1"),
        ({"architecture": "topk", "k": 21}, r"k must be an int in \[1, 20\], got 21"),
        ({"metadata": [1]}, "metadata must be an object"),
        ({"architecture": "jumprelu_skip_transcoder", "d_out": 6}, "'W_skip' is missing"),
        ({"metadata": ..., "activation_fn": "tanh-relu"}, "activation_fn must be relu or topk"),
        ({"metadata": ..., "finetuning_scaling_factor": True}, "finetuning_scaling_factor must"),
    ],
)
def test_folders_of_saelens_that_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=f"load: .*({message})"):
        gsf.load(saelens(tmp_path, **config))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"activation": "groupmax"}, "activation must be topk, got 'groupmax'"),
        ({"skip_connection": True}, "skip_connection must come with transcode"),
        ({"num_latents": 19}, r"encoder.weight must be floating point of shape \[19, 6\]"),
        ({"num_latents": 0, "expansion_factor": 4}, r"of shape \[24, 6\] as cfg.json has it"),
        ({"k": 0}, r"k must be an int in \[1, 20\], got 0"),
        ({"transcode": True, "skip_connection": True}, "'W_skip' is missing"),
    ],
)
def test_folders_of_sparsify_that_are_refused(config, message, tmp_path):
    SPARSIFY_MODULES["sae"].save_pretrained(tmp_path, format="sparsify")
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=f"load: .*{message}"):
        gsf.load(tmp_path)


def test_a_folder_without_a_config(tmp_path):
    folder = saelens(tmp_path)
    os.unlink(folder / "cfg.json")
    with pytest.raises(FileNotFoundError, match=r"cfg.json is missing, beside sae_weights"):
        gsf.load(folder)
    with pytest.raises(ValueError, match="streamed=True needs a safetensors file"):
        gsf.load(saelens(tmp_path), streamed=True)


def test_the_commands_read_them(tmp_path, capsys):
    SPARSIFY_MODULES["skip"].save_pretrained(tmp_path / "sparsify", format="sparsify")
    SAELENS_MODULES["centred"].save_pretrained(tmp_path / "saelens", format="saelens")
    assert cli.main(["inspect", str(tmp_path / "sparsify"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["type"] == "transcoder" and found["layers"][0]["threshold"] is None
    assert cli.main(["convert", str(tmp_path / "saelens"), str(tmp_path / "new")]) == 0
    assert "folded into the weights" in capsys.readouterr().out
    x = torch.randn(9, 6)
    torch.testing.assert_close(
        gsf.load(tmp_path / "new")(x), SAELENS_MODULES["centred"](x), rtol=1e-4, atol=1e-5
    )
