"""`save_pretrained`: the bytes it writes, and that no crash leaves half an artefact."""

import json
import os
import subprocess
import sys

import pytest
import torch
from attacks import write
from safetensors import safe_open
from safetensors.torch import save_file

from gemmascope_fast import SAE, Transcoder, load
from gemmascope_fast.artefacts import gemma_scope_2

OLD = {"l0": 7, "model_name": "old", "note": [1]}
NEW = {"l0": 9, "model_name": "new"}


def old_and_new():
    """Different kinds and sizes: any mixture of their files is inconsistent."""
    generator = torch.Generator().manual_seed(3)
    old = Transcoder(6, 12, d_out=5, affine=True, generator=generator)
    old.metadata = dict(OLD)
    new = SAE(6, 10, generator=generator)
    new.metadata = dict(NEW)
    return old, new


def which(folder):
    """The artefact in `folder`, which must be one of the two, whole."""
    found = load(folder)
    for name, module in zip(("old", "new"), old_and_new(), strict=True):
        if type(found) is type(module) and found.metadata == module.metadata:
            state = found.state_dict()
            assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
            return name
    raise AssertionError(f"neither: {found} {found.metadata}")


def failing(function, at, error):
    """`function`, but its call number `at` raises."""
    calls = iter(range(100))

    def call(*args, **kwargs):
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "name, at, survivor",
    [
        *(("fsync", at, "old") for at in (0, 1)),  # the two files
        ("replace", 0, "old"),
        *(("fsync", at, "new") for at in (2, 3)),  # the folder, after each rename
        ("replace", 1, "new"),
    ],
)
def test_a_failure_midway(name, at, survivor, error, tmp_path, monkeypatch):
    old, new = old_and_new()
    old.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), at, error))
        with pytest.raises(type(error)):
            new.save_pretrained(tmp_path)
    assert which(tmp_path) == survivor
    assert sorted(os.listdir(tmp_path)) == ["config.json", "params.safetensors"]
    new.save_pretrained(tmp_path)
    assert which(tmp_path) == "new"


@pytest.mark.parametrize("name, at, survivor", [("fsync", 0, None), ("replace", 1, "new")])
def test_a_failure_in_a_new_folder(name, at, survivor, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), at, OSError("no")))
        with pytest.raises(OSError, match="no"):
            old_and_new()[1].save_pretrained(tmp_path / "f")
    if survivor is None:
        assert not (tmp_path / "f").exists()
    else:
        assert which(tmp_path / "f") == survivor


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_artefacts_saving import failing, old_and_new
calls = iter(range(100))
real = getattr(os, sys.argv[3])
def die(*args):
    if next(calls) == int(sys.argv[4]):
        os._exit(9)
    return real(*args)
setattr(os, sys.argv[3], die)
old_and_new()[1].save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize("name, at, survivor", [("replace", 0, "old"), ("replace", 1, "new")])
def test_a_killed_process(name, at, survivor, tmp_path):
    old_and_new()[0].save_pretrained(tmp_path)
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", KILLED, here, str(tmp_path), name, str(at)]
    assert subprocess.run(command).returncode == 9
    assert which(tmp_path) == survivor
    old_and_new()[1].save_pretrained(tmp_path)
    assert which(tmp_path) == "new"


def test_a_crash_over_a_published_folder(tmp_path, monkeypatch):
    """Its header carries no config: the old config.json must not describe the new weights."""
    save_file({k: v.clone() for k, v in published().items()}, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"type": "sae", "width": 8, "l0": 3}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, 1, OSError("no")))
        with pytest.raises(OSError, match="no"):
            old_and_new()[1].save_pretrained(tmp_path)
    assert which(tmp_path) == "new"


def published():
    generator = torch.Generator().manual_seed(5)
    shapes = {"w_enc": (3, 8), "w_dec": (8, 3), "b_enc": (8,), "threshold": (8,), "b_dec": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_weight_that_is_not_finite_is_not_written(tmp_path):
    old, new = old_and_new()
    old.save_pretrained(tmp_path)
    for name in ("W_enc", "threshold"):
        bad = old_and_new()[1]
        with torch.no_grad():
            getattr(bad, name)[..., 3] = float("nan")
        with pytest.raises(ValueError, match=f"save_pretrained: {name} must be finite"):
            bad.save_pretrained(tmp_path)
    assert which(tmp_path) == "old"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_bytes_are_the_librarys(dtype, tmp_path):
    """The body and its order equal what the library's writer makes of row-major tensors."""
    module = Transcoder(6, 10, d_out=5, affine=True, dtype=dtype)
    module.save_pretrained(tmp_path)
    names = {"W_skip": "affine_skip_connection", "W_enc": "w_enc", "W_dec": "w_dec"}
    tensors = {names.get(k, k): v.contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (parts(tmp_path / n) for n in ("params.safetensors", "theirs"))
    assert ours[0].pop("__metadata__")["format"] == theirs[0].pop("__metadata__")["format"]
    assert list(ours[0].items()) == list(theirs[0].items())
    assert ours[1] == theirs[1]
    with safe_open(tmp_path / "params.safetensors", "pt") as file:
        assert file.get_slice("w_enc").get_shape() == [6, 10]
        assert json.loads(file.metadata()["config"])["width"] == 10


def parts(path):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert end % 8 == 0
    return json.loads(data[8:end]), data[end:]


def test_a_dictionary_of_one_latent(tmp_path):
    module = SAE(4, 1, dtype=torch.bfloat16)
    module.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).W_enc, module.W_enc)


def test_config_that_is_written(tmp_path):
    Transcoder(6, 10, affine=True).save_pretrained(
        tmp_path / "new" / "folder",
        l0=12.5,
        model_name="google/gemma-3-1b-pt",
        hf_hook_point_in="model.layers.3.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.3.post_feedforward_layernorm.output",
    )
    assert json.loads((tmp_path / "new" / "folder" / "config.json").read_text()) == {
        "type": "transcoder",
        "architecture": "jump_relu",
        "width": 10,
        "l0": 12.5,
        "affine_connection": True,
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
    }


def test_other_files_and_links_stay(tmp_path):
    """A save replaces a link, never what it leads to."""
    write(tmp_path / "f" / "notes.txt", b"mine")
    write(tmp_path / "elsewhere", b"theirs")
    (tmp_path / "f" / "params.safetensors").symlink_to("../elsewhere")
    old_and_new()[1].save_pretrained(tmp_path / "f")
    assert which(tmp_path / "f") == "new"
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert (tmp_path / "f" / "notes.txt").read_bytes() == b"mine"
    mask = os.umask(0o027)
    os.umask(mask)
    assert (tmp_path / "f" / "params.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    "metadata, error, message",
    [
        ({"l0": -1}, ValueError, "save_pretrained: l0 must be a number >= 0, got -1"),
        ({"l0": float("nan")}, ValueError, "metadata must be plain JSON values"),
        ({"model_name": 3}, ValueError, "model_name must be a string, got 3"),
        ({"x": torch.zeros(1)}, TypeError, "metadata must be plain JSON values"),
        ({"x": "y" * 70_000}, ValueError, "at most 65536 bytes"),
        ({3: 4, "3": 5}, ValueError, "has a key twice"),
    ],
)
def test_metadata_that_would_not_load(metadata, error, message, tmp_path):
    module = SAE(6, 10)
    module.metadata = metadata
    with pytest.raises(error, match=message):
        module.save_pretrained(tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_paths_that_cannot_be_written(tmp_path):
    module = SAE(6, 10)
    write(tmp_path / "file", b"")
    with pytest.raises(ValueError, match="path must be a folder, and .* is a file"):
        module.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="path must be a folder, and .* lies below a file"):
        module.save_pretrained(tmp_path / "file" / "below")
    with pytest.raises(TypeError, match="path must be a str or a path, got NoneType"):
        module.save_pretrained(None)
    (tmp_path / "f" / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="config.json is a folder"):
        module.save_pretrained(tmp_path / "f")
    with pytest.raises(ValueError, match="W_enc is on the meta device"):
        SAE(6, 10, device="meta").save_pretrained(tmp_path / "g")


def test_parameters_that_do_not_fit_together(tmp_path):
    module = SAE(6, 10)
    module.b_dec = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"save_pretrained: b_dec must have shape \[6\]"):
        module.save_pretrained(tmp_path / "f")
    assert gemma_scope_2.PARAMS not in os.listdir(tmp_path)
