"""`python -m gemmascope_fast inspect`: numbers, verdicts and exit codes."""

import json
import subprocess
import sys

import pytest
import torch
from attacks import arrays
from attacks.published import scope_1, scope_2
from safetensors.torch import load_file, save_file

import gemmascope_fast as gsf
from gemmascope_fast import cli


def random_(module, seed=0):
    """Unit decoder rows, positive thresholds, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    module.reset_parameters(generator)
    vectors = (module.threshold, module.b_enc)
    with torch.no_grad():
        for t in [t for v in vectors for t in ([v] if isinstance(v, torch.Tensor) else v)]:
            t.uniform_(0.1, 0.9, generator=generator)
        module.b_dec.normal_(generator=generator)
    return module


ROWS = {
    "resid_post/layer_17_width_16k_l0_medium": (gsf.SAE(6, 10), "sae"),
    "attn_out_all/layer_3_width_16k_l0_small": (gsf.SAE(8, 10), "sae"),
    "mlp_out/layer_12_width_262k_l0_medium_seed_1": (gsf.SAE(6, 14), "sae"),
    "transcoder/layer_7_width_16k_l0_big": (gsf.Transcoder(6, 10), "transcoder"),
    "transcoder_all/layer_7_width_16k_l0_big_affine": (
        gsf.Transcoder(6, 10, affine=True),
        "transcoder",
    ),
    "crosscoder/layer_5_9_12_15_width_65k_l0_medium": (gsf.Crosscoder(4, 6, 10), "crosscoder"),
    "clt/width_262k_l0_medium": (gsf.CrossLayerTranscoder(3, 6, 10), "clt"),
    "clt/width_262k_l0_big_affine": (gsf.CrossLayerTranscoder(3, 6, 10, affine=True), "clt"),
}


def inspect(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out), {c["name"]: c["verdict"] for c in json.loads(out)["checks"]}


@torch.no_grad()
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("path", ROWS)
def test_every_published_kind(path, config, tmp_path, capsys):
    """With and without a config, loaded and streamed: its sizes, and an L0 and FVU by hand."""
    module, kind = ROWS[path]
    random_(module).save_pretrained(tmp_path / path, l0=4)
    if not config:
        (tmp_path / path / "config.json").unlink()
        for file in (tmp_path / path).glob("*.safetensors"):
            save_file(load_file(file), file)  # without the config in its header
    several = kind in ("crosscoder", "clt")
    width = (module.n_layers, module.d_model) if several else (module.d_in,)
    x, target = torch.randn(2, 30, *width).unbind()
    save_file({"x": x, "target": target}, tmp_path / "acts.safetensors")
    options = [tmp_path / path, "--activations", tmp_path / "acts.safetensors"]
    code, found, verdicts = inspect(capsys, *options)
    assert inspect(capsys, *options, "--streamed")[1] == found
    goal = target if kind in ("transcoder", "clt") else x
    acts = module.encode(x)
    l0 = [float(a.l0().mean()) for a in (acts if several else [acts])]
    error = (module(x) - goal).square().sum((0, -1)) / (goal - goal.mean(0)).square().sum((0, -1))
    assert found["type"] == kind and found["n_layers"] == (width[0] if several else None)
    assert found["measured"]["l0"] == pytest.approx(l0)
    assert found["measured"]["fvu"] == pytest.approx(error.reshape(-1).tolist(), rel=1e-5)
    assert code == (verdicts["fvu"] == "fail" or verdicts.get("l0") == "fail")
    assert [verdicts[name] for name in ("finite", "thresholds", "latents")] == ["ok"] * 3
    assert ("l0" in verdicts) == config
    assert cli.main(["inspect", *map(str, options)]) == code
    text = capsys.readouterr().out
    assert f"{sum(l0):.4g}" in text and f"d_sae {module.d_sae}" in text


def test_gemma_scope_1(tmp_path, capsys):
    path = scope_1(tmp_path / "layer_3/width_16k/average_l0_20/params.npz", arrays())
    code, found, verdicts = inspect(capsys, path)
    assert (code, found["type"], found["metadata"]["l0"]) == (0, "sae", 20)
    assert verdicts["thresholds"] == "warn" and found["layers"][0]["negative"] > 0


@torch.no_grad()
def test_numbers_of_the_weights(tmp_path, capsys, monkeypatch):
    """In several blocks, the last one short; each number against its definition."""
    monkeypatch.setattr("gemmascope_fast.artefacts.validate.BLOCK_BYTES", 1)
    module = gsf.Transcoder(20, 50, d_out=18)
    for p in module.parameters():
        p.normal_()
    module.W_dec[7].zero_()
    module.W_enc[:, 9].zero_()
    module.save_pretrained(tmp_path)
    layer = inspect(capsys, tmp_path)[1]["layers"][0]
    expected = {
        "encoder": module.W_enc.norm(dim=0),
        "decoder": module.W_dec.norm(dim=1),
        "threshold": module.threshold,
        "b_enc": module.b_enc,
        "b_dec": module.b_dec,
    }
    for name, t in expected.items():
        numbers = {"min": t.min(), "median": t.median(), "max": t.max()}
        assert layer[name] == pytest.approx({k: float(v) for k, v in numbers.items()}), name
    assert layer["silent"] == 2 and layer["negative"] == int((module.threshold < 0).sum())


@torch.no_grad()
def test_decoders_that_write_backwards(tmp_path, capsys):
    module = gsf.Crosscoder(3, 4, 10, packed=[True, False, True])
    module.W_dec[1][:, :4] = 1.0
    module.save_pretrained(tmp_path)
    code, found, verdicts = inspect(capsys, tmp_path)
    assert [layer["backwards"] for layer in found["layers"]] == [0, 40, 0]
    assert (code, verdicts["causal"]) == (0, "warn")


# ---- verdicts


@torch.no_grad()
def test_an_l0_that_is_not_the_published_one(tmp_path, capsys):
    module, x = random_(gsf.SAE(6, 10)), torch.randn(40, 6)
    l0 = float(module.encode(x).l0().mean())
    save_file({"x": x}, tmp_path / "x.safetensors")
    for claimed, verdict in ((l0 * 1.9, "ok"), (l0 * 2.1, "fail"), (l0 / 2.1, "fail")):
        module.save_pretrained(tmp_path / "f", l0=claimed)
        path = tmp_path / "x.safetensors"
        code, _, verdicts = inspect(capsys, tmp_path / "f", "--activations", path)
        assert verdicts["l0"] == verdict and (code == 1 or verdicts["fvu"] == "ok")


def test_a_dictionary_that_reconstructs(tmp_path, capsys):
    """The identity and its negative: FVU 0, exit code 0."""
    module = gsf.SAE(4, 8)
    with torch.no_grad():
        module.W_dec.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        module.W_enc.copy_(module.W_dec.t())
        module.threshold.zero_()
    module.save_pretrained(tmp_path / "f", l0=4)
    save_file({"x": torch.randn(2, 50, 4)}, tmp_path / "x.safetensors")
    arguments = [tmp_path / "f", "--activations", tmp_path / "x.safetensors"]
    code, found, verdicts = inspect(capsys, *arguments)
    assert code == 0 and set(verdicts.values()) == {"ok"}
    assert found["measured"] == {"tokens": 100, "l0": [4.0], "silent": [0], "fvu": [0.0]}


def test_weights_that_are_not_finite(tmp_path, capsys):
    tensors = arrays()
    tensors["w_dec"][3, 1] = float("nan")
    scope_2(tmp_path / "f", tensors)
    save_file({"x": torch.randn(5, 6)}, tmp_path / "x.safetensors")
    arguments = [tmp_path / "f", "--activations", tmp_path / "x.safetensors"]
    code, found, verdicts = inspect(capsys, *arguments)
    assert (code, verdicts) == (1, {"finite": "fail"})
    assert found["layers"][0]["decoder"]["max"] is None and "measured" not in found
    assert cli.main(["inspect", str(tmp_path / "f")]) == 1
    assert "fail  finite  in w_dec" in capsys.readouterr().out


def test_a_damaged_file(tmp_path, capsys):
    scope_2(tmp_path, arrays())
    data = (tmp_path / "params.safetensors").read_bytes()
    (tmp_path / "params.safetensors").write_bytes(data[:-4])
    code, found, verdicts = inspect(capsys, tmp_path)
    assert (code, verdicts) == (1, {"readable": "fail"})
    assert "must be a complete safetensors file" in found["checks"][0]["detail"]
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "fail  readable" in capsys.readouterr().out


def test_a_transcoder_without_a_target(tmp_path, capsys):
    random_(gsf.Transcoder(6, 10)).save_pretrained(tmp_path / "f")
    save_file({"x": torch.randn(40, 6)}, tmp_path / "x.safetensors")
    arguments = [tmp_path / "f", "--activations", tmp_path / "x.safetensors"]
    code, found, verdicts = inspect(capsys, *arguments)
    assert (code, verdicts["fvu"], found["measured"]["fvu"]) == (0, "warn", None)


def test_what_cannot_be_used(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    random_(gsf.SAE(6, 10)).save_pretrained(tmp_path / "f")
    arguments = ["inspect", str(tmp_path / "f"), "--activations"]
    assert cli.main([*arguments, str(tmp_path / "x.safetensors")]) == 2
    for x, message in ((torch.zeros(3, 5), r"x must be [*batch, 6]"), (torch.zeros(0, 6), "least")):
        save_file({"x": x}, tmp_path / "x.safetensors")
        assert cli.main([*arguments, str(tmp_path / "x.safetensors")]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect"])
    assert stopped.value.code == 2


def test_the_module_from_the_shell(tmp_path):
    random_(gsf.SAE(6, 10)).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "gemmascope_fast", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok    thresholds  none is negative" in done.stdout
