"""`python -m gemmascope_fast convert`."""

import argparse

import pytest
import torch
from safetensors.torch import load_file

import gemmascope_fast as gsf
from gemmascope_fast import cli
from gemmascope_fast.commands import convert


def convert_(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def sae(tmp_path):
    made = gsf.SAE(6, 20)
    made.metadata = {"l0": 7, "model_name": "m"}
    made.save_pretrained(tmp_path / "sae")
    return made


def test_another_dtype_and_fewer_latents(sae, tmp_path, capsys):
    options = ("--dtype", "bfloat16", "--latents", "0:12")
    assert convert_(tmp_path / "sae", tmp_path / "new", *options) == 0
    assert "SAE as gemma_scope_2" in capsys.readouterr().out
    found = gsf.load(tmp_path / "new")
    assert torch.equal(found.W_enc, sae.W_enc[:, :12].bfloat16())
    assert torch.equal(found.threshold, sae.threshold[:12]) and found.metadata["l0"] == 7


def test_another_format(sae, tmp_path):
    assert convert_(tmp_path / "sae", tmp_path / "new", "--to", "saelens") == 0
    found = load_file(tmp_path / "new" / "sae_weights.safetensors")
    assert torch.equal(found["W_enc"], sae.W_enc) and torch.equal(found["W_dec"], sae.W_dec)


def test_several_layers(tmp_path):
    made = gsf.CrossLayerTranscoder(3, 4, 10, affine=True)
    made.save_pretrained(tmp_path / "clt")
    assert convert_(tmp_path / "clt", tmp_path / "new", "--latents", "2:9") == 0
    found = gsf.load(tmp_path / "new")
    assert isinstance(found, gsf.CrossLayerTranscoder)
    assert all(
        torch.equal(ours, theirs[2:9]) for ours, theirs in zip(found.W_dec, made.W_dec, strict=True)
    )
    assert convert_(tmp_path / "clt", tmp_path / "x", "--to", "saelens") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("absent", "new"), "does not exist"),
        (("sae", "new", "--to", "sparsify"), "sparsify has TopK only, got JumpReLU"),
        (("sae", "new", "--latents", "0:21"), "latents"),
        (
            ("sae", "sae", "--latents", "0:12"),
            "sae holds files: name another folder or --overwrite",
        ),
        (
            ("sae", "sae", "--to", "saelens", "--overwrite"),
            "holds a single-layer artefact of Gemma Scope 2",
        ),
    ],
)
def test_what_cannot_be_used(arguments, message, sae, tmp_path, capsys):
    paths = [tmp_path / name for name in arguments[:2]]
    assert convert_(*paths, *arguments[2:]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert torch.equal(gsf.load(tmp_path / "sae").W_enc, sae.W_enc)


def test_what_is_there_stays_unless_asked(sae, tmp_path):
    (tmp_path / "new").mkdir()  # an empty folder is as good as none
    assert convert_(tmp_path / "sae", tmp_path / "new") == 0
    assert convert_(tmp_path / "sae", tmp_path / "new", "--latents", "0:12") == 2
    assert gsf.load(tmp_path / "new").d_sae == 20
    assert convert_(tmp_path / "sae", tmp_path / "new", "--latents", "0:12", "--overwrite") == 0
    assert gsf.load(tmp_path / "new").d_sae == 12


def test_arguments_that_are_none():
    assert convert.latents(":5") == slice(0, 5) and convert.latents("3:5") == slice(3, 5)
    for text in ("5", "a:5", "3:", "-1:5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be start:stop"):
            convert.latents(text)
    for options in (["--to", "onnx"], ["--dtype", "int8"], ["--latents", "x"]):
        with pytest.raises(SystemExit) as stopped:
            convert_("a", "b", *options)
        assert stopped.value.code == 2
