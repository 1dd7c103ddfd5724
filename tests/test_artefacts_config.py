"""`config.json`: read, inferred where it is missing, and kept."""

import json

import numpy as np
import pytest
from attacks import arrays
from attacks.published import CONFIG, scope_1, scope_2

from gemmascope_fast import SAE, Transcoder, load

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")


@pytest.mark.parametrize(
    "path, affine, kind, metadata",
    [
        ("anything", False, SAE, {}),
        ("anything", True, Transcoder, {}),
        (
            "google/gemma-scope-2-4b-it/resid_post_all/layer_9_width_16k_l0_big",
            False,
            SAE,
            {
                "model_name": "google/gemma-3-4b-it",
                "hf_hook_point_in": "model.layers.9.output",
                "hf_hook_point_out": "model.layers.9.output",
            },
        ),
        (
            "models--google--gemma-scope-2-1b-pt/snapshots/0a/transcoder/layer_13_width_65k_l0_big",
            False,
            Transcoder,
            {
                "model_name": "google/gemma-3-1b-pt",
                "hf_hook_point_in": "model.layers.13.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.13.post_feedforward_layernorm.output",
            },
        ),
        (
            "attn_out/layer_3_width_1m_l0_medium_seed_1",
            False,
            SAE,
            {
                "hf_hook_point_in": "model.layers.3.self_attn.o_proj.input",
                "hf_hook_point_out": "model.layers.3.self_attn.o_proj.input",
            },
        ),
        ("clt/mine/resid_post", False, SAE, {}),  # names out of place say nothing
    ],
)
def test_a_missing_config_is_inferred(path, affine, kind, metadata, tmp_path):
    tensors = arrays()
    if affine:
        tensors["affine_skip_connection"] = np.eye(6, dtype=np.float32)
    module = load(scope_2(tmp_path / path, tensors))
    assert type(module) is kind
    assert module.metadata == metadata


def test_different_widths_make_a_transcoder(tmp_path):
    assert type(load(scope_2(tmp_path, arrays(d_out=4)))) is Transcoder


def test_gemma_scope_1_paths(tmp_path):
    path = tmp_path / "gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68/params.npz"
    module = load(scope_1(path, arrays()))
    assert type(module) is SAE and module.metadata == {"l0": 68}
    path = tmp_path / "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_41/params.npz"
    assert type(load(scope_1(path, arrays()))) is Transcoder


def test_metadata_round_trip(tmp_path):
    extra = {"note": {"tokens": [1, 2.5, None]}, "model_name": "gemma-v3-4b \u00e9\ud800 -v3"}
    first = scope_2(tmp_path / "a", arrays(), **(CONFIG | extra))
    module = load(first)
    assert module.metadata["l0"] == 20 and module.metadata["note"] == extra["note"]
    module.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written == CONFIG | extra
    assert list(written)[:8] == list(CONFIG)
    load(tmp_path / "b").save_pretrained(tmp_path / "b", l0=31.5, model_name="m")
    assert load(tmp_path / "b").metadata == {
        **{k: v for k, v in (CONFIG | extra).items() if k in ("note",) or k.startswith("hf")},
        **{"l0": 31.5, "model_name": "m"},
    }


def test_a_config_edited_by_hand_is_read(tmp_path):
    SAE(6, 10).save_pretrained(tmp_path, l0=5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"l0": 6, "model_name": "x"}))
    assert load(tmp_path).metadata == {"l0": 6, "model_name": "x"}
    (tmp_path / "config.json").unlink()
    assert load(tmp_path).metadata == {"l0": 5}
