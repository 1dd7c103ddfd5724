"""`save_pretrained` of several layers: its bytes, and that no crash leaves files of two saves."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_artefacts_saving import failing, parts

from gemmascope_fast import SAE, Crosscoder, CrossLayerTranscoder, JumpReLU, TopK, load
from gemmascope_fast.artefacts import files, layer_files
from gemmascope_fast.artefacts.gemma_scope_2 import SafetensorsFile

NAMES = [f"params_layer_{i}.safetensors" for i in range(3)]
FILES = ["config.json", *NAMES]


def random_(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        for threshold in module.threshold:
            threshold.abs_()
    return module


def old_and_new():
    """The same sizes: only what the files say keeps them apart."""
    old = random_(CrossLayerTranscoder(3, 4, 10, affine=True), 1)
    new = random_(CrossLayerTranscoder(3, 4, 10, affine=True), 2)
    old.metadata, new.metadata = {"l0": 7, "model_name": "old"}, {"l0": 9, "model_name": "new"}
    return old, new


def which(folder):
    """The artefact in `folder` by the rule of `layer_files`: old or new, whole, or neither."""
    with SafetensorsFile(folder / NAMES[0]) as first:
        save, own = first.metadata.get(layer_files.SAVE_KEY), first.own_config
        data = (folder / "config.json").read_bytes() if (folder / "config.json").exists() else None
        stale = data is None or first.supersedes(data)
        name = json.loads(first.metadata["config"] if stale else data)["model_name"]
        assert own is not None
    module = old_and_new()[name == "new"]
    for i in range(3):
        with layer_files.open_layer(folder, i, save) as file:
            assert torch.equal(load_file(file.path)["w_enc"], module.W_enc[i])
    return name


def layer(module, i):
    """What file i must hold, written out."""
    L, d = module.b_dec.shape
    W_dec = torch.zeros(module.d_sae, L, d)
    reached = module.W_dec[i].shape[1] // d
    for j in range(L - reached, L):
        at = (j - (L - reached)) * d
        W_dec[:, j] = module.W_dec[i][:, at : at + d]
    made = {"w_enc": module.W_enc[i], "w_dec": W_dec, "b_enc": module.b_enc[i]}
    made |= {"threshold": module.threshold[i], "b_dec": module.b_dec[i]}
    if getattr(module, "W_skip", None) is not None:
        made["affine_skip_connection"] = module.W_skip[i]
    return {name: t.detach().contiguous() for name, t in made.items()}


MODULES = {
    "clt": CrossLayerTranscoder(3, 4, 10),
    "clt_affine": CrossLayerTranscoder(3, 4, 10, affine=True),
    "clt_full": CrossLayerTranscoder(3, 4, 10, packed=False),
    "crosscoder": Crosscoder(4, 6, 15),
    "crosscoder_mixed": Crosscoder(3, 6, 15, packed=[True, False, True]),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_bytes_are_the_librarys(name, tmp_path):
    module = random_(MODULES[name], 3)
    module.save_pretrained(tmp_path / "ours", l0=50)
    for i in range(module.n_layers):
        save_file(layer(module, i), tmp_path / "theirs", metadata={"format": "pt"})
        ours = parts(tmp_path / "ours" / f"params_layer_{i}.safetensors")
        theirs = parts(tmp_path / "theirs")
        assert ours[0].pop("__metadata__")["format"] == theirs[0].pop("__metadata__")["format"]
        assert list(ours[0].items()) == list(theirs[0].items())
        assert ours[1] == theirs[1]
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == {
        "type": name.split("_")[0],
        "architecture": "jump_relu",
        "width": module.n_layers * module.d_sae,
        "l0": 50,
        "affine_connection": name == "clt_affine",
    }


def test_zeros_before_the_source_are_exact_in_16_bits(tmp_path):
    module = random_(CrossLayerTranscoder(3, 4, 10, dtype=torch.bfloat16), 3)
    module.save_pretrained(tmp_path)
    found = load_file(tmp_path / NAMES[2])
    assert found["w_dec"].dtype == torch.bfloat16 and found["threshold"].dtype == torch.float32
    assert torch.equal(found["w_dec"][:, :2], torch.zeros(10, 2, 4, dtype=torch.bfloat16))
    assert torch.equal(found["w_dec"][:, 2], module.W_dec[2])


def test_blocks_of_rows(tmp_path, monkeypatch):
    """Several blocks per tensor, the last one short."""
    monkeypatch.setattr("gemmascope_fast.artefacts.validate.BLOCK_BYTES", 1)  # 16 rows each
    module = random_(CrossLayerTranscoder(2, 20, 50, affine=True), 4)
    module.save_pretrained(tmp_path)
    for i in range(2):
        found = load_file(tmp_path / NAMES[i])
        assert all(torch.equal(found[name], t) for name, t in layer(module, i).items())


# ---- one change of several files


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "name, at, survivor",
    [
        *(("fsync", at, "old") for at in (0, 2, 3, 4)),  # three layers, the config, the folder
        ("replace", 0, "old"),
        *(("replace", at, "new") for at in (1, 2, 3)),
        *(("fsync", at, "new") for at in (5, 6, 7, 8)),  # the folder, after each rename
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
    left = [n for n in os.listdir(tmp_path) if n not in FILES]
    assert all(n.startswith(".params_layer_") for n in left) and len(left) <= 2
    assert not left or survivor == "new"
    old.save_pretrained(tmp_path)
    assert which(tmp_path) == "old"
    assert sorted(os.listdir(tmp_path)) == FILES


def killed(folder, name, at):
    """A process that saves the new artefact ends at call number `at` of `os.<name>`."""
    pid = os.fork()
    if pid == 0:
        calls, real = iter(range(100)), getattr(os, name)
        setattr(os, name, lambda *args: os._exit(9) if next(calls) == at else real(*args))
        try:
            old_and_new()[1].save_pretrained(folder)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("at, survivor", [(0, "old"), (1, "new"), (3, "new")])
def test_a_killed_process_and_one_killed_while_it_cleans(at, survivor, tmp_path):
    """The second save is killed before its own first rename: what the first left counts."""
    old_and_new()[0].save_pretrained(tmp_path)
    for name, number in (("replace", at), ("fsync", 1)):
        killed(tmp_path, name, number)
        assert which(tmp_path) == survivor
    old_and_new()[1].save_pretrained(tmp_path)
    assert which(tmp_path) == "new"
    assert sorted(os.listdir(tmp_path)) == FILES


def test_a_crash_over_a_published_folder(tmp_path, monkeypatch):
    old, new = old_and_new()
    for i in range(3):
        save_file(layer(old, i), tmp_path / NAMES[i])
    (tmp_path / "config.json").write_text(json.dumps({"type": "clt", "model_name": "old"}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, 2, OSError("no")))
        with pytest.raises(OSError, match="no"):
            new.save_pretrained(tmp_path)
    assert which(tmp_path) == "new"
    for name in os.listdir(tmp_path):
        if name.startswith("."):
            os.unlink(tmp_path / name)
    with pytest.raises(ValueError, match=r"params_layer_2.* another save than params_layer_0"):
        which(tmp_path)
    os.unlink(tmp_path / NAMES[2])
    with pytest.raises(FileNotFoundError, match="params_layer_2.safetensors is missing"):
        which(tmp_path)


def test_files_copied_between_artefacts_are_not_mixed(tmp_path):
    for module, name in zip(old_and_new(), ("a", "b"), strict=True):
        module.save_pretrained(tmp_path / name)
    os.replace(tmp_path / "a" / NAMES[1], tmp_path / "b" / NAMES[1])
    with pytest.raises(ValueError, match=r"params_layer_1.* another save than params_layer_0"):
        which(tmp_path / "b")


@pytest.mark.parametrize("at", [1, 2])
def test_a_file_that_gets_its_name_while_it_is_looked_at(at, tmp_path, monkeypatch):
    """Gone from its temporary name right after it was found there: it is read under its own."""
    modules = old_and_new()
    modules[0].save_pretrained(tmp_path)
    killed(tmp_path, "replace", at)
    looked, stat = [], os.stat

    def slow(path, *args, **kwargs):
        found = stat(path, *args, **kwargs)
        if not looked and str(path).endswith(".tmp"):
            looked.append(path)
            layer_files.complete(tmp_path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "stat", slow)
        found = load(tmp_path)
    assert looked and found.metadata["model_name"] == "new"
    assert torch.equal(found.W_enc[2], modules[1].W_enc[2])


def test_writers_and_a_reader(tmp_path):
    """At every moment one whole artefact, though layers have their names one after another."""
    modules = old_and_new()
    modules[0].save_pretrained(tmp_path)
    done, start = threading.Event(), time.monotonic()

    def write_on(module):
        while not done.is_set():
            module.save_pretrained(tmp_path)

    seen = set()
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write_on, module) for module in modules]
        try:
            while time.monotonic() < start + 2 or len(seen) < 2:  # a disk may be slow
                found = load(tmp_path)
                module = modules[found.metadata["model_name"] == "new"]
                state = module.state_dict()
                assert all(torch.equal(t, state[key]) for key, t in found.state_dict().items())
                seen.add(found.metadata["model_name"])
                assert time.monotonic() < start + 60
        finally:
            done.set()
    assert [w.result() for w in writers] == [None, None]
    assert sorted(os.listdir(tmp_path)) == FILES


# ---- refused


def test_a_folder_with_another_kind_of_artefact(tmp_path):
    clt = old_and_new()[0]
    SAE(4, 10).save_pretrained(tmp_path / "single")
    with pytest.raises(ValueError, match="holds a single-layer artefact of Gemma Scope 2"):
        clt.save_pretrained(tmp_path / "single")
    clt.save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match=r"holds an artefact of several layers \(params_layer_0"):
        SAE(4, 10).save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match=r"artefact of more layers \(params_layer_2.safetensors\)"):
        CrossLayerTranscoder(2, 4, 10).save_pretrained(tmp_path / "several")
    assert which(tmp_path / "several") == "old"
    assert sorted(os.listdir(tmp_path / "single")) == ["config.json", "params.safetensors"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Crosscoder(2, 4, 10, TopK(3)), "hold JumpReLU only, got TopK"),
        (lambda: Crosscoder(2, 4, 10, JumpReLU(), device="meta"), r"W_enc\[0\] is on the meta"),
    ],
)
def test_modules_that_cannot_be_written(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_a_value_that_is_not_finite_is_named(tmp_path):
    module = old_and_new()[0]
    with torch.no_grad():
        module.W_dec[1][3, 2] = float("inf")
    with pytest.raises(ValueError, match=r"W_dec\[1\] must be finite"):
        module.save_pretrained(tmp_path / "f")
    assert os.listdir(tmp_path) == []
