"""Untrusted files: every attack is refused by one clear error, and nothing else is opened."""

import os
import shutil
import tracemalloc
from warnings import catch_warnings, simplefilter

import numpy as np
import pytest
import torch
from attacks import arrays, configs, tensors, write, zips
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as library_load

from gemmascope_fast import SAE, Transcoder, load
from gemmascope_fast.artefacts import files

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")

ATTACKS = [(module, name) for module in (zips, tensors, configs) for name in module.CASES]


@pytest.mark.parametrize(
    "module, name", ATTACKS, ids=[f"{m.__name__.split('.')[1]}-{name}" for m, name in ATTACKS]
)
def test_attack(module, name, tmp_path):
    module.make(name, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=module.CASES[name][1]) as caught:
            load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith("load: ") and len(str(caught.value)) < 600
    assert peak < 16 << 20  # numpy and Python together: nothing declared was allocated


def test_the_attacked_files_are_valid_otherwise(tmp_path):
    """So that each attack is refused for what it does, not for a fault of the generator."""
    write(tmp_path / "params.safetensors", tensors.VALID)
    write(tmp_path / "config.json", configs.text())
    expected = arrays()
    assert torch.equal(load(tmp_path).W_enc, torch.from_numpy(expected["w_enc"]))
    for method in (0, 8):
        write(tmp_path / "a.npz", zips.archive(zips.members(), method))
        assert torch.equal(load(tmp_path / "a.npz").W_enc, torch.from_numpy(expected["w_enc"]))
    write(tmp_path / "a.npz", zips.archive(zips.members(b_dec=zips.npy(expected["b_dec"], x=1))))
    with pytest.raises(ValueError, match="b_dec.npy is damaged"):
        load(tmp_path / "a.npz")


def test_thresholds_of_every_sign_are_valid(tmp_path):
    """Negative ones are seldom meant: one warning."""
    module = SAE(6, 10)
    for low, warnings in ((0, 0), (-2, 1)):
        with torch.no_grad():
            module.threshold.copy_(torch.linspace(low, 2, 10))
        module.save_pretrained(tmp_path)
        with catch_warnings(record=True) as caught:
            simplefilter("always")
            assert torch.equal(load(tmp_path).threshold, module.threshold)
        assert [str(w.message).partition(": ")[0] for w in caught] == ["load"] * warnings


# what is opened


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: source .*absent does not exist"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must hold params.safetensors .* has none of them"):
        load(tmp_path)
    write(tmp_path / "config.json", configs.text())
    with pytest.raises(FileNotFoundError, match="must hold params.safetensors"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "config.json" / "below")


@pytest.mark.parametrize(
    "source, error, message",
    [
        (b"path", TypeError, "source must be a str or a path, got bytes"),
        (None, TypeError, "source must be a str or a path, got NoneType"),
        (3, TypeError, "source must be a str or a path, got int"),
        ("a\0b", ValueError, "NUL character"),
        ("", ValueError, "source is empty"),
        ("x" * 5000, ValueError, "must be a path: File name too long"),
    ],
)
def test_sources_that_are_no_paths(source, error, message):
    with pytest.raises(error, match=message):
        load(source)


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='path is empty; the folder one is in is "."'):
        SAE(2, 3).save_pretrained("")
    assert not list(tmp_path.iterdir())
    SAE(2, 3).save_pretrained(".")
    assert load(".").d_sae == 3


def test_a_folder_that_cannot_be_made():
    if not os.path.exists("/proc/self"):
        pytest.skip("no /proc, which takes no folders")
    with pytest.raises(FileNotFoundError, match="/proc/sae cannot be made"):
        SAE(2, 3).save_pretrained("/proc/sae")


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"dtype": "float32"}])
def test_dtype_argument(options, tmp_path):
    with pytest.raises(TypeError, match="load: dtype must be float32, bfloat16"):
        load(tmp_path, **options)
    with pytest.raises(TypeError, match="save_pretrained: dtype must be float32, bfloat16"):
        SAE(2, 3).save_pretrained(tmp_path, **options)


def test_device_argument(tmp_path):
    write(tmp_path / "params.safetensors", tensors.VALID)
    with pytest.raises(ValueError, match="load: device must name a torch device, got 'toaster'"):
        load(tmp_path, device="toaster")
    assert load(tmp_path, device="meta").W_enc.is_meta


def test_examples_are_never_read(tmp_path):
    write(tmp_path / "params.safetensors", tensors.VALID)
    os.mkfifo(tmp_path / "examples.safetensors")  # opening it would wait for ever
    load(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="source must be a folder, a params.safetensors or an"):
        load(tmp_path / "examples.safetensors")


@pytest.mark.parametrize("name", ["params.safetensors", "config.json", "params.npz"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "dangling", "device"])
def test_only_regular_files_are_opened(name, kind, tmp_path):
    if name == "config.json":
        write(tmp_path / "params.safetensors", tensors.VALID)
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path, "dangling": tmp_path / "x", "device": "/dev/zero"}[kind])
    message = {"loop": "leads nowhere", "dangling": "leads nowhere", "device": "leaves its folder"}
    with pytest.raises(ValueError, match=message.get(kind, "must be a regular file, and is")):
        load(tmp_path)


@pytest.mark.parametrize("name", ["params.safetensors", "config.json"])
def test_links_stay_inside_the_folder(name, tmp_path):
    folder = tmp_path / "f"
    write(folder / "params.safetensors", tensors.VALID)
    write(folder / "config.json", configs.text())
    shutil.move(folder / name, folder / "inside")
    (folder / name).symlink_to("inside")
    load(folder)
    shutil.move(folder / "inside", tmp_path / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to("../outside")
    with pytest.raises(ValueError, match=f"{name} is a link that leaves its folder; pass the file"):
        load(folder)


def test_named_links_and_linked_folders_are_followed(tmp_path):
    write(tmp_path / "real" / "params.safetensors", tensors.VALID)
    (tmp_path / "link").symlink_to("real")
    load(tmp_path / "link")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "params.safetensors").symlink_to(tmp_path / "real/params.safetensors")
    load(tmp_path / "other" / "params.safetensors")


def test_the_cache_of_the_hub(tmp_path):
    """Its snapshots are links into `blobs`; elsewhere they may not lead."""
    repository = tmp_path / "models--google--gemma-scope-2-1b-pt"
    folder = repository / "snapshots/0a1b/transcoder/layer_7_width_16k_l0_big"
    folder.mkdir(parents=True)
    write(repository / "blobs" / "d1", tensors.VALID)
    write(tmp_path / "secret", tensors.VALID)
    (folder / "params.safetensors").symlink_to("../../../../blobs/d1")
    module = load(folder)
    assert type(module) is Transcoder
    assert module.metadata["model_name"] == "google/gemma-3-1b-pt"
    (folder / "config.json").symlink_to("../../../../../secret")
    with pytest.raises(ValueError, match="config.json is a link that leaves its folder"):
        load(folder)


@pytest.mark.parametrize("name", ["params.safetensors", "config.json"])
def test_unreadable_files(name, tmp_path, monkeypatch):
    write(tmp_path / "params.safetensors", tensors.VALID)
    write(tmp_path / "config.json", configs.text())
    denied, real = str(tmp_path / name), os.open  # a superuser may read anything: pretend

    def refuse(path, *args, **kwargs):
        if str(path) == denied:
            raise PermissionError(13, "Permission denied", denied)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(PermissionError, match=f"load: .*{name} cannot be read"):
        load(tmp_path)


def test_a_file_replaced_while_it_is_read_is_read_to_its_end(tmp_path, monkeypatch):
    from gemmascope_fast.artefacts import gemma_scope_2

    write(tmp_path / "params.safetensors", tensors.VALID)
    read = gemma_scope_2.SafetensorsFile.blocks

    def blocks(self, name, region):
        write(tmp_path / "new", tensors.safetensors(arrays(seed=1)))
        os.replace(tmp_path / "new", tmp_path / "params.safetensors")
        yield from read(self, name, region)

    monkeypatch.setattr(gemma_scope_2.SafetensorsFile, "blocks", blocks)
    old = load(tmp_path)
    monkeypatch.undo()
    assert torch.equal(old.W_enc, torch.from_numpy(arrays()["w_enc"]))
    assert torch.equal(load(tmp_path).W_enc, torch.from_numpy(arrays(seed=1)["w_enc"]))


@pytest.mark.parametrize("again", [True, False])
def test_a_file_that_is_gone_for_a_moment(again, tmp_path, monkeypatch):
    """As a save of two files removes the config, then writes it."""
    path, real = tmp_path / "config.json", files.Path.resolve
    write(path, b"{}")

    def gone(self, strict=False):
        if self != path:
            return real(self, strict)
        monkeypatch.undo()
        os.unlink(path)
        try:
            return real(path, strict)
        finally:
            if again:
                write(path, b"[]")

    monkeypatch.setattr(files.Path, "resolve", gone)
    assert files.config_bytes(tmp_path) == (b"[]" if again else None)


def test_a_file_that_cannot_be_resolved(tmp_path, monkeypatch):
    write(tmp_path / "config.json", b"{}")

    def lost(self, strict=False):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(files.Path, "resolve", lost)
    with pytest.raises(ValueError, match=r"config.json leads nowhere: .*No such file"):
        files.member(tmp_path, "config.json")


@pytest.mark.parametrize("change", ["written", "cut"])
def test_a_file_changed_while_it_is_read(change, tmp_path, monkeypatch):
    from gemmascope_fast.artefacts import gemma_scope_2

    path = tmp_path / "params.safetensors"
    write(path, tensors.VALID)
    read = gemma_scope_2.SafetensorsFile.blocks

    def blocks(self, name, region):
        with open(path, "r+b") as file:
            file.truncate(600 if change == "cut" else len(tensors.VALID))
            os.utime(path, ns=(0, next(times)))
        yield from read(self, name, region)

    times = iter(range(100))
    monkeypatch.setattr(gemma_scope_2.SafetensorsFile, "blocks", blocks)
    with pytest.raises(ValueError, match="changed while it was read; load it again|complete"):
        load(tmp_path)


# fuzz: valid or refused, never anything else

EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=0, max_size=4
)


def mutate(data, edits, cut):
    out = bytearray(data)
    for where, flip in edits:
        out[int(where * len(out))] ^= flip
    return bytes(out[: len(out) - cut])


fuzz = settings(max_examples=200, derandomize=True, deadline=None, database=None)
CUTS = st.one_of(st.just(0), st.integers(0, 300))


@fuzz
@given(edits=EDITS, cut=CUTS, header=st.booleans())
def test_fuzz_safetensors(edits, cut, header, tmp_path_factory):
    size = 8 + int.from_bytes(tensors.VALID[:8], "little") if header else len(tensors.VALID)
    data = mutate(tensors.VALID[:size], edits, cut if size > 400 else 0) + tensors.VALID[size:]
    path = tmp_path_factory.getbasetemp() / "params.safetensors"
    write(path, data)
    try:
        module = load(path)
    except ValueError as error:
        assert str(error).startswith("load: ")
        return
    expected = library_load(data)
    assert torch.equal(module.W_enc, expected["w_enc"])
    for name in ("b_enc", "b_dec", "threshold", "w_dec"):
        value = getattr(module, name.replace("w_", "W_"))
        assert torch.equal(value, expected[name].to(value.dtype))
        assert bool(torch.isfinite(value).all())


@fuzz
@given(edits=EDITS, cut=CUTS, deflated=st.booleans(), directory=st.booleans())
def test_fuzz_npz(edits, cut, deflated, directory, tmp_path_factory):
    valid = zips.archive(zips.members(), 8 if deflated else 0)
    at = valid.index(b"PK\1\2") if directory else 0
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    write(path, valid[:at] + mutate(valid[at:], edits, cut))
    try:
        module = load(path)
    except ValueError as error:
        assert str(error).startswith("load: ")
        return
    for name, array in arrays().items():  # the checksums leave only the original values
        value = getattr(module, name.replace("w_", "W_"))
        np.testing.assert_array_equal(value.detach().numpy(), array)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["type", "architecture", "width", "l0", "affine_connection", "model_name"])


@fuzz
@given(changes=st.dictionaries(KEYS, JSON, max_size=2), edits=EDITS)
def test_fuzz_config(changes, edits, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    write(folder / "params.safetensors", tensors.VALID)
    write(folder / "config.json", mutate(configs.text(**changes), edits, 0))
    try:
        module = load(folder)
    except ValueError as error:
        assert str(error).startswith("load: ")
        return
    assert module.d_sae == 10
    module.save_pretrained(folder.with_name("fuzz-again"))
    assert load(folder.with_name("fuzz-again")).metadata == module.metadata
