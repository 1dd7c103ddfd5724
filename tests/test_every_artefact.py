"""Every row of Gemma Scope's tables, as published but narrow: `load`, a forward pass, `inspect`.

The files are written by the safetensors library and numpy under the published names; what a module
computes is compared with the published maths in float64.
"""

import json
from math import prod

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gemmascope_fast as gsf
from gemmascope_fast import cli

SKIP = "affine_skip_connection"
SITES = {
    "resid_post": ("output", "output"),
    "mlp_out": ("post_feedforward_layernorm.output",) * 2,
    "attn_out": ("self_attn.o_proj.input",) * 2,
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
SITES |= {"crosscoder": SITES["resid_post"], "clt": SITES["transcoder"]}
D = {"resid_post": (7, 7), "mlp_out": (7, 7), "attn_out": (9, 9), "transcoder": (7, 5)}

SINGLE = [  # model, folder: every site, suite, width, L0 and suffix occurs
    ("270m-pt", "resid_post/layer_5_width_16k_l0_small"),
    ("1b-it", "resid_post/layer_13_width_65k_l0_medium"),
    ("4b-pt", "resid_post/layer_17_width_262k_l0_big"),
    ("27b-it", "resid_post/layer_53_width_1m_l0_medium"),
    ("12b-pt", "resid_post/layer_24_width_262k_l0_medium_seed_1"),
    ("270m-it", "resid_post_all/layer_0_width_16k_l0_small"),
    ("27b-pt", "resid_post_all/layer_61_width_262k_l0_big"),
    ("1b-pt", "mlp_out/layer_7_width_1m_l0_big"),
    ("4b-it", "mlp_out/layer_9_width_262k_l0_medium_seed_1"),
    ("12b-it", "mlp_out_all/layer_47_width_16k_l0_small"),
    ("4b-pt", "attn_out/layer_29_width_65k_l0_medium"),
    ("1b-it", "attn_out_all/layer_25_width_262k_l0_big"),
    ("270m-pt", "transcoder/layer_15_width_16k_l0_small"),
    ("27b-it", "transcoder/layer_40_width_262k_l0_medium_affine"),
    ("12b-pt", "transcoder/layer_41_width_262k_l0_medium_affine_seed_1"),
    ("4b-pt", "transcoder_all/layer_33_width_16k_l0_big"),
    ("1b-it", "transcoder_all/layer_3_width_262k_l0_small_affine"),
]
SEVERAL = [  # and the source layers, latents of each, and the total that the config names
    ("270m-pt", "crosscoder/layer_5_9_12_15_width_65k_l0_medium", 4, 16, 64),
    ("27b-it", "crosscoder/layer_16_31_40_53_width_1m_l0_big", 4, 23, 92),
    ("1b-pt", "clt/width_262k_l0_medium", 26, 10, 262),  # 26 files of 10,080 for 262,144
    ("270m-it", "clt/width_524k_l0_big_affine", 18, 14, 254),
]
SCOPE_1 = ["2b-pt-res", "9b-pt-mlp", "27b-pt-att", "2b-pt-transcoders"]


def tensors(seed, d_in, F, d_dec, affine):
    """One file: unit decoder rows, both signs of biases, thresholds that about half pass."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = normal(F, prod(d_dec))
    made = {
        "w_enc": normal(d_in, F),
        "w_dec": (rows / rows.norm(dim=1, keepdim=True)).view(F, *d_dec),
        "b_enc": normal(F),
        "threshold": normal(F).abs(),
        "b_dec": normal(d_dec[-1]),
    }
    return made | ({SKIP: normal(d_in, d_dec[-1])} if affine else {})


def dense(files, x):
    """The published maths: `x [n, d_in]` of one file, `[n, L, d]` of one file per source."""
    files = [{name: t.double() for name, t in f.items()} for f in files]
    x = x.double() if x.dim() == 3 else x.double()[:, None]
    outputs = []
    for j, own in enumerate(files):
        y = own["b_dec"].expand(len(x), -1)
        for i, source in enumerate(files[: j + 1]):
            pre = x[:, i] @ source["w_enc"] + source["b_enc"]
            f = torch.where(pre > source["threshold"], pre, 0)
            w_dec = source["w_dec"]
            y = y + f @ (w_dec if w_dec.dim() == 2 else w_dec[:, j])
        outputs.append(y + x[:, j] @ own[SKIP] if SKIP in own else y)
    return torch.stack(outputs, 1)


def config(model, site, layers, width, affine):
    hooks = [f"model.layers.{layers}.{point}" for point in SITES[site]]
    kind = site if site in ("transcoder", "crosscoder", "clt") else "sae"
    return {
        **{"type": kind, "architecture": "jump_relu", "width": width, "l0": 20},
        **{"affine_connection": affine, "model_name": f"gemma-v3-{model}"},
        **{"hf_hook_point_in": hooks[0], "hf_hook_point_out": hooks[1]},
    }


def check(source, files, published, kind, capsys, streams=True):
    """Forward passes, and what `inspect` says of the files."""
    d_in, F = files[0]["w_enc"].shape
    several = kind in (gsf.Crosscoder, gsf.CrossLayerTranscoder)
    x = torch.randn(11, *((len(files),) if several else ()), d_in)
    module = gsf.load(source)
    assert type(module) is kind and module.metadata == published[1]
    expected = dense(files, x).view(11, *module(x).shape[1:])
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-4)
    if streams:
        torch.testing.assert_close(gsf.load(source, streamed=True)(x), module(x))
    assert cli.main(["inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in ("type", "d_in", "d_sae")] == [published[0], d_in, F]
    assert found["d_out"] == files[0]["w_dec"].shape[-1] and found["affine"] == (SKIP in files[0])
    assert found["n_layers"] == (len(files) if several else None)
    assert found["metadata"] == published[1]
    verdicts = {c["name"]: c["verdict"] for c in found["checks"]}
    assert set(verdicts.values()) == {"ok"} and ("causal" in verdicts) == several


def folder_of(tmp_path, model, path, files, written):
    """The folder below a local copy of its repository."""
    folder = tmp_path / "google" / f"gemma-scope-2-{model}" / path
    folder.mkdir(parents=True)
    several = files[0]["w_dec"].dim() == 3
    for i, shard in enumerate(files):
        name = f"params_layer_{i}" if several else "params"
        save_file(shard, folder / f"{name}.safetensors")
    (folder / "examples.safetensors").symlink_to("/nowhere")  # never touched
    if written is not None:
        (folder / "config.json").write_text(json.dumps(written))
    return folder


def metadata(config, model, with_config):
    """What a module keeps of the config, or infers from the path."""
    keys = ("hf_hook_point_in", "hf_hook_point_out")
    kept = {key: config[key] for key in (*keys, "l0", "model_name")}
    inferred = {key: config[key] for key in keys} | {"model_name": f"google/gemma-3-{model}"}
    return config["type"], kept if with_config else inferred


@torch.no_grad()
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "path"])
@pytest.mark.parametrize("model, path", SINGLE, ids=[path for _, path in SINGLE])
def test_single_layer(model, path, with_config, tmp_path, capsys):
    site, affine = path.split("/")[0].removesuffix("_all"), "_affine" in path
    layer, (d_in, d_out) = path.split("layer_")[1].split("_")[0], D[site]
    files = [tensors(len(path), d_in, 30, (d_out,), affine)]
    published = config(model, site, layer, 30, affine)
    folder = folder_of(tmp_path, model, path, files, published if with_config else None)
    kind = gsf.Transcoder if site == "transcoder" else gsf.SAE
    check(folder, files, metadata(published, model, with_config), kind, capsys)


@torch.no_grad()
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "path"])
@pytest.mark.parametrize("model, path, L, F, width", SEVERAL, ids=[row[1] for row in SEVERAL])
def test_several_layers(model, path, L, F, width, with_config, tmp_path, capsys):
    site, affine = path.split("/")[0], "_affine" in path
    files = [tensors(i, 6, F, (L, 6), affine) for i in range(L)]
    for i, shard in enumerate(files):
        shard["w_dec"][:, :i] = 0  # absolute outputs: nothing before the source
    layers = range(L) if site == "clt" else path.split("layer_")[1].split("_width")[0].split("_")
    hooks = "{" + ",".join(map(str, layers)) + "}"
    published = config(model, site, hooks, width, affine)
    folder = folder_of(tmp_path, model, path, files, published if with_config else None)
    kind = gsf.Crosscoder if site == "crosscoder" else gsf.CrossLayerTranscoder
    check(folder, files, metadata(published, model, with_config), kind, capsys)
    assert sum(W.numel() for W in gsf.load(folder).W_dec) == F * 6 * L * (L + 1) // 2


@torch.no_grad()
@pytest.mark.parametrize("repository", SCOPE_1)
def test_gemma_scope_1(repository, tmp_path, capsys):
    kind = gsf.Transcoder if repository.endswith("transcoders") else gsf.SAE
    files = [tensors(1, 7, 30, (5 if kind is gsf.Transcoder else 7,), False)]
    root = tmp_path / "google" / f"gemma-scope-{repository}"
    folder = root / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    upper = {name.replace("w_", "W_"): t.numpy() for name, t in files[0].items()}
    np.savez(folder / "params.npz", **upper)
    name = "transcoder" if kind is gsf.Transcoder else "sae"
    for source in (folder, folder / "params.npz"):
        check(source, files, (name, {"l0": 71}), kind, capsys, streams=False)
