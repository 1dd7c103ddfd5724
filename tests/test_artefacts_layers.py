"""Crosscoders and cross-layer transcoders: what `load` makes of one file per source layer."""

import numpy as np
import pytest
import torch
from attacks import shards as hostile
from attacks import write
from attacks.published import dense_layers, layers, scope_2, scope_2_layers

from gemmascope_fast import Crosscoder, CrossLayerTranscoder, load

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")

CROSSCODER = {"type": "crosscoder", "architecture": "jump_relu", "affine_connection": False}
CLT = {"type": "clt", "architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "threshold": "threshold"}
NAMES |= {"affine_skip_connection": "W_skip"}


def assert_same_bits(module, shards):
    """Every tensor of every file is where it belongs."""
    for i, shard in enumerate(shards):
        for name, array in shard.items():
            if name in NAMES:
                found = getattr(module, NAMES[name])[i]
                assert torch.equal(found, torch.from_numpy(array)), (i, name)
        first = 0 if module.W_dec[i].shape[1] == len(shards) * module.d_model else i
        expected = torch.from_numpy(shard["w_dec"][:, first:].reshape(len(shard["w_dec"]), -1))
        assert torch.equal(module.W_dec[i], expected)
        assert torch.equal(module.b_dec[i], torch.from_numpy(shard["b_dec"]))
        assert module.W_enc[i].t().is_contiguous() and module.W_dec[i].is_contiguous()


@pytest.mark.parametrize(
    "kind, config, affine, sizes",
    [
        (Crosscoder, CROSSCODER | {"width": 40}, False, (4, 6, 10)),
        (CrossLayerTranscoder, CLT | {"width": 30}, False, (3, 6, 10)),
        (CrossLayerTranscoder, CLT | {"affine_connection": True}, True, (5, 7, 91)),
        (CrossLayerTranscoder, CLT, False, (1, 3, 2)),
    ],
)
def test_a_published_folder(kind, config, affine, sizes, tmp_path):
    shards = layers(*sizes, affine=affine)
    module = load(scope_2_layers(tmp_path, shards, **config))
    assert type(module) is kind
    assert (module.n_layers, module.d_model, module.d_sae) == sizes
    assert [W.shape[1] // sizes[1] for W in module.W_dec] == [sizes[0] - i for i in range(sizes[0])]
    assert_same_bits(module, shards)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    x = np.random.default_rng(1).standard_normal((30, *sizes[:2])).astype(np.float32)
    expected = dense_layers(shards, x)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), expected, atol=2e-5)
    if affine:  # square: a transpose would go unnoticed but for the numbers
        flipped = [s | {"affine_skip_connection": s["affine_skip_connection"].T} for s in shards]
        assert np.abs(dense_layers(flipped, x) - expected).max() > 1


def test_a_decoder_that_is_not_causal_is_kept_whole(tmp_path):
    """The last latent of layer 2 writes to layer 0: only its file keeps all outputs."""
    shards = layers(4)
    shards[2]["w_dec"][-1, 0, 3] = 0.5
    shards[3]["w_dec"][:, 1] = -0.0
    module = load(scope_2_layers(tmp_path, shards, **CLT))
    assert [W.shape[1] // 6 for W in module.W_dec] == [4, 3, 4, 1]
    assert_same_bits(module, shards)
    x = np.random.default_rng(1).standard_normal((30, 4, 6)).astype(np.float32)
    expected = dense_layers(shards, x)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), expected, atol=2e-5)


def test_blocks_cover_every_row(tmp_path, monkeypatch):
    """Blocks of 16 rows; what is not causal is found in the last of them."""
    monkeypatch.setattr("gemmascope_fast.artefacts.validate.BLOCK_BYTES", 1)
    shards = layers(3, 20, 40)
    assert_same_bits(load(scope_2_layers(tmp_path / "a", shards, **CLT)), shards)
    shards[1]["w_dec"][39, 0, 19] = 1
    module = load(scope_2_layers(tmp_path / "b", shards, **CLT))
    assert module.W_dec[1].shape == (40, 60)
    assert_same_bits(module, shards)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_converts_the_matrices_only(dtype, tmp_path):
    shards = layers(affine=True)
    module = load(scope_2_layers(tmp_path, shards, **CLT), dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for i, shard in enumerate(shards):
        for name, attribute in NAMES.items():
            kept = dtype if attribute.startswith("W") else wide
            expected = torch.from_numpy(shard[name]).to(kept)
            found = getattr(module, attribute)[i]
            assert found.dtype == kept and torch.equal(found, expected), name
        expected = torch.from_numpy(shard["w_dec"][:, i:].reshape(10, -1)).to(dtype)
        assert module.W_dec[i].dtype == dtype and torch.equal(module.W_dec[i], expected)
    assert module.b_dec.dtype == wide


def test_a_width_that_the_layers_do_not_divide_is_nominal(tmp_path):
    """As 262,144 of the 1b CLT, whose 26 layers have 10,080 latents."""
    shards = layers(3, 2, 333)
    assert load(scope_2_layers(tmp_path / "a", shards, **CLT, width=1000)).d_sae == 333
    for width in (998, 1010):
        folder = scope_2_layers(tmp_path / str(width), shards, **CLT, width=width)
        with pytest.raises(ValueError, match=f"width is {width}, but w_enc has 333 in each of 3"):
            load(folder)


@pytest.mark.parametrize(
    "path, affine, kind, layer",
    [
        ("gemma-scope-2-270m-it/crosscoder/layer_5_9_12_width_65k_l0_big", False, Crosscoder, 0),
        ("gemma-scope-2-1b-pt/clt/width_262k_l0_medium", False, CrossLayerTranscoder, 1),
        ("gemma-scope-2-1b-pt/clt/width_524k_l0_big_affine", True, CrossLayerTranscoder, 1),
        ("anything", True, CrossLayerTranscoder, None),
    ],
)
def test_a_missing_config_is_inferred(path, affine, kind, layer, tmp_path):
    module = load(scope_2_layers(tmp_path / "google" / path, layers(affine=affine)))
    assert type(module) is kind
    hooks = [
        ("model.layers.{5,9,12}.output", "model.layers.{5,9,12}.output"),
        (
            "model.layers.{0,1,2}.pre_feedforward_layernorm.output",
            "model.layers.{0,1,2}.post_feedforward_layernorm.output",
        ),
    ]
    if layer is None:
        assert module.metadata == {}
        return
    model = path.split("/")[0].replace("gemma-scope-2", "google/gemma-3")
    keys = ("hf_hook_point_in", "hf_hook_point_out", "model_name")
    assert module.metadata == dict(zip(keys, (*hooks[layer], model), strict=True))


def test_a_path_with_another_number_of_layers_has_no_hooks(tmp_path):
    folder = scope_2_layers(tmp_path / "crosscoder/layer_5_9_width_65k_l0_big", layers(3))
    assert load(folder).metadata == {}


def test_files_of_both_kinds(tmp_path):
    """The type decides; without one the single file, which writers put there last, counts."""
    folder = scope_2_layers(tmp_path / "f", layers(), **CLT)
    scope_2(folder, {k: v for k, v in layers()[0].items() if k != "w_dec"} | {"w_dec": EYE})
    assert type(load(folder)) is CrossLayerTranscoder
    (folder / "config.json").unlink()
    assert type(load(folder)).__name__ == "SAE"


EYE = np.ones((10, 6), np.float32)


def test_one_layer_of_several_is_no_artefact(tmp_path):
    folder = scope_2_layers(tmp_path, layers(), **CLT)
    with pytest.raises(ValueError, match=r"is one layer of several: pass its folder, "):
        load(folder / "params_layer_1.safetensors")


def test_class_methods(tmp_path):
    scope_2_layers(tmp_path, layers(), **CLT)
    assert CrossLayerTranscoder.from_pretrained(tmp_path, dtype=torch.bfloat16).d_sae == 10
    with pytest.raises(ValueError, match="Crosscoder.from_pretrained: .* a CrossLayerTranscoder"):
        Crosscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", hostile.CASES)
def test_attack(name, tmp_path, monkeypatch):
    hostile.make(name, tmp_path)
    if "NaN" not in name:  # everything declared is checked before anything is allocated
        monkeypatch.setattr(torch, "empty", None)
    with pytest.raises((ValueError, FileNotFoundError), match=hostile.CASES[name][2]) as caught:
        load(tmp_path)
    assert type(caught.value) is (FileNotFoundError if "missing" in name else ValueError)
    assert str(caught.value).startswith("load: ") and len(str(caught.value)) < 600


def test_the_attacked_files_are_valid_otherwise(tmp_path):
    hostile.CASES["valid"] = (hostile.VALID, hostile.CLT, "")
    try:
        hostile.make("valid", tmp_path)
    finally:
        del hostile.CASES["valid"]
    assert_same_bits(load(tmp_path), hostile.VALID)


def test_names_that_look_like_layers_are_ignored(tmp_path):
    scope_2_layers(tmp_path, layers(), **CLT)
    for name in ("params_layer_03.safetensors", "params_layer_3.safetensors.part"):
        write(tmp_path / name, b"")
    assert load(tmp_path).n_layers == 3
