"""`python -m gemmascope_fast encode`, and `load_acts`: files of sparse activations."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from attacks.peers import duplicated
from safetensors.torch import load_file, save_file

import gemmascope_fast as gsf
from gemmascope_fast import cli
from gemmascope_fast.commands import spool
from gemmascope_fast.commands.tokens import TokenFile


@pytest.fixture
def folder(tmp_path):
    """An SAE, a CLT, and activations for both."""
    generator = torch.Generator().manual_seed(0)
    sae = gsf.SAE(8, 40, generator=generator)
    clt = gsf.CrossLayerTranscoder(3, 4, 10, generator=generator)
    with torch.no_grad():
        for threshold in (sae.threshold, *clt.threshold):
            threshold.uniform_(0.2, 0.8, generator=generator)
    sae.save_pretrained(tmp_path / "sae")
    clt.save_pretrained(tmp_path / "clt")
    x = torch.randn(5, 7, 8, generator=generator)
    save_file({"x": x, "half": x.bfloat16()}, tmp_path / "x.safetensors")
    layers = torch.randn(50, 3, 4, generator=generator)
    save_file({"x": layers}, tmp_path / "layers.safetensors")
    return tmp_path


def run(folder, *options, x="x", sae="sae", out="acts"):
    paths = [str(folder / f"{x}.safetensors"), "--sae", str(folder / sae)]
    return cli.main(["encode", *paths, "-o", str(folder / f"{out}.safetensors"), *options])


def same(found, expected):
    assert found.shape == expected.shape
    for name in ("offsets", "indices", "values", "gate"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@torch.no_grad()
def test_the_entries_of_an_sae(folder, capsys):
    assert run(folder, "--block", "9") == 0
    x = load_file(folder / "x.safetensors")["x"]
    expected = gsf.load(folder / "sae").encode(x)
    same(gsf.load_acts(folder / "acts.safetensors"), expected)
    assert not (folder / "acts.safetensors.partial").exists()
    out = capsys.readouterr().out
    assert f"35 tokens, {expected.nnz:,} entries, L0 {expected.nnz / 35:.1f}" in out
    stored = load_file(folder / "acts.safetensors")
    assert set(stored) == {"offsets", "indices", "values", "shape"}
    assert stored["shape"].tolist() == [5, 7, 40]


@torch.no_grad()
@pytest.mark.parametrize("options", [(), ("--streamed",)])
def test_the_entries_of_each_layer(options, folder):
    assert run(folder, "--block", "16", *options, x="layers", sae="clt") == 0
    found = gsf.load_acts(folder / "acts.safetensors")
    expected = gsf.load(folder / "clt").encode(load_file(folder / "layers.safetensors")["x"])
    assert len(found) == 3 and len({a.nnz for a in found}) > 1
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)


@torch.no_grad()
def test_another_tensor_and_dtype(folder):
    assert run(folder, "--key", "half", "--dtype", "bfloat16") == 0
    half = load_file(folder / "x.safetensors")["half"]
    expected = gsf.load(folder / "sae", dtype=torch.bfloat16).encode(half)
    same(gsf.load_acts(folder / "acts.safetensors"), expected)


def test_no_tokens(folder):
    save_file({"x": torch.zeros(0, 8)}, folder / "none.safetensors")
    assert run(folder, x="none") == 0
    found = gsf.load_acts(folder / "acts.safetensors")
    assert found.shape == (0, 40) and found.nnz == 0


# ---- resuming


def killed(call, module, name, at):
    """A process that does `call` ends at call number `at` of `module.<name>`."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a forked child has none of its parent's threads
        count, real = iter(range(10**6)), getattr(module, name)
        setattr(module, name, lambda *a: os._exit(9) if next(count) == at else real(*a))
        try:
            call()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("name, of", [("fsync", os), ("replace", os), ("rmtree", spool.shutil)])
def test_killed_at_every_moment(name, of, folder):
    """After each synced array, each rename, and before the folder goes: the same file again."""
    options = ("--block", "9")
    assert run(folder, *options, out="whole") == 0
    whole = (folder / "whole.safetensors").read_bytes()
    at = 0
    while killed(lambda: run(folder, *options), of, name, at) == 9:
        assert run(folder, *options) == 0
        assert (folder / "acts.safetensors").read_bytes() == whole
        assert not (folder / "acts.safetensors.partial").exists()
        (folder / "acts.safetensors").unlink()
        at += 1
    assert at == {"fsync": 2 + 4 * (3 + 2) + 2, "replace": 6, "rmtree": 1}[name]


def test_a_resumed_run_encodes_only_what_is_missing(folder, capsys, monkeypatch):
    options = ("--block", "9")
    assert killed(lambda: run(folder, *options), os, "replace", 3) == 9  # run.json, two blocks
    encoded, real = [], gsf.SAE.encode
    monkeypatch.setattr(gsf.SAE, "encode", lambda self, x: encoded.append(len(x)) or real(self, x))
    assert run(folder, *options) == 0
    assert encoded == [35, 9, 8]  # the sample, then tokens 18 to 34
    assert "18 tokens are there already" in capsys.readouterr().err
    assert run(folder, *options) == 0
    assert encoded == [35, 9, 8, 35]
    assert "complete already" in capsys.readouterr().out


def test_what_another_run_left(folder, capsys):
    assert killed(lambda: run(folder, "--block", "9"), os, "replace", 3) == 9
    assert run(folder, "--block", "10") == 2
    assert "left by another run: block differ" in capsys.readouterr().err
    other = gsf.load(folder / "sae")
    with torch.no_grad():
        other.W_enc.mul_(1.5)
    other.save_pretrained(folder / "other")
    assert run(folder, "--block", "9", sae="other") == 2
    assert "left by another run: sae differ" in capsys.readouterr().err
    assert run(folder, "--block", "9", "--restart", sae="other") == 0
    with torch.no_grad():
        expected = other.encode(load_file(folder / "x.safetensors")["x"])
    same(gsf.load_acts(folder / "acts.safetensors"), expected)
    assert run(folder, "--block", "9") == 0  # a complete file is replaced
    assert gsf.load_acts(folder / "acts.safetensors").nnz != expected.nnz


def test_two_processes_do_not_write_one_file(folder, capsys):
    with spool.spool(folder / "acts.safetensors", {"values": "float32"}, [None]):
        assert run(folder) == 2
    assert "is in use: another process writes" in capsys.readouterr().err


def test_a_kill_from_outside(folder):
    """SIGKILL of the command itself, whenever it comes; then the module's own exit code."""
    save_file({"x": torch.randn(300, 8)}, folder / "x.safetensors")
    assert run(folder, "--block", "16", out="whole") == 0
    command = [sys.executable, "-m", "gemmascope_fast", "encode", str(folder / "x.safetensors")]
    command += ["--sae", str(folder / "sae"), "-o", str(folder / "acts.safetensors")]
    command += ["--block", "16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    done = folder / "acts.safetensors.partial" / "done.json"
    while process.poll() is None and not done.exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout[-1:]) == (0, "\n"), finished.stderr
    whole = (folder / "whole.safetensors").read_bytes()
    assert (folder / "acts.safetensors").read_bytes() == whole


# ---- refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"x": "absent"}, "absent.safetensors does not exist"),
        ({"sae": "absent"}, "absent does not exist"),
        ({"x": "layers"}, r"x must be [*batch, 8], got [50, 3, 4]"),
        ({"x": "x", "sae": "clt"}, r"x must be [*batch, 3, 4], got [5, 7, 8]"),
        ({"out": "absent/acts"}, "--out must be a file in an existing folder"),
    ],
)
def test_what_cannot_be_used(options, message, folder, capsys):
    assert run(folder, **options) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("*.partial"))


def test_more_that_cannot_be_used(folder, capsys):
    assert run(folder, "--key", "y") == 2
    assert "must hold y, and holds half, x" in capsys.readouterr().err
    assert run(folder, "--block", "0") == 2
    assert "--block must be >= 1" in capsys.readouterr().err
    save_file({"x": torch.zeros(3, 8, dtype=torch.int64)}, folder / "x.safetensors")
    assert run(folder) == 2
    assert "x must be floating point, 16 bits or more, got I64" in capsys.readouterr().err
    (folder / "x.safetensors").write_bytes(b"no")
    assert run(folder) == 2
    assert "must be a complete safetensors file" in capsys.readouterr().err


def stored(**changes):
    good = {
        "offsets": torch.tensor([0, 2, 2, 3]),
        "indices": torch.tensor([1, 4, 0], dtype=torch.int32),
        "values": torch.tensor([1.0, 2.0, 3.0]),
        "shape": torch.tensor([3, 5]),
    }
    return {k: v for k, v in (good | changes).items() if v is not None}


def test_a_file_that_is_good(tmp_path):
    save_file(stored(), tmp_path / "f")
    expected = torch.tensor([[0, 1, 0, 0, 2], [0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0]])
    assert torch.equal(gsf.load_acts(tmp_path / "f").to_dense(), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": None}, "'values' is missing"),
        ({"more": torch.zeros(1)}, "'more' is unknown"),
        ({"values": torch.zeros(2)}, "values must have 3 elements"),
        ({"values": torch.zeros(3, dtype=torch.int32)}, "values must be a float32 or float64 vec"),
        ({"offsets": torch.tensor([0, 3])}, r"offsets must have n \+ 1 = 4 elements, got 2"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, "offsets must ascend from 0 to the 3 entries"),
        ({"offsets": torch.tensor([0, 2, 2, 2])}, "offsets must ascend from 0 to the 3 entries"),
        ({"offsets": torch.tensor([1, 2, 2, 3])}, "offsets must ascend from 0 to the 3 entries"),
        ({"indices": torch.tensor([1, 5, 0], dtype=torch.int32)}, r"be in \[0, d_sae=5\)"),
        ({"indices": torch.tensor([-1, 4, 0], dtype=torch.int32)}, r"be in \[0, d_sae=5\)"),
        ({"indices": torch.tensor([4, 4, 0], dtype=torch.int32)}, "ascend inside each token"),
        ({"indices": torch.tensor([1, 4, 0])}, "indices must be a int32 vector"),
        ({"shape": torch.tensor([-3, 5])}, "shape must hold sizes >= 0"),
        ({"shape": torch.tensor([], dtype=torch.int64)}, "shape must hold 1 to 64 sizes"),
    ],
)
def test_files_that_load_acts_refuses(changes, message, tmp_path):
    save_file(stored(**changes), tmp_path / "f")
    with pytest.raises(ValueError, match=message):
        gsf.load_acts(tmp_path / "f")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="load_acts: .* does not exist"):
        gsf.load_acts(tmp_path / "f")
    (tmp_path / "f").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        gsf.load_acts(tmp_path / "f")


# ---- files that are not what they were, or never were


def test_a_file_larger_than_memory(tmp_path):
    """Tokens are read where they are asked for: a sparse file stands for 4 TiB."""
    path, n, d = tmp_path / "x.safetensors", 1 << 28, 1 << 12
    entry = {"dtype": "F32", "shape": [n // 4, 4, d], "data_offsets": [0, 4 * n * d]}
    header = json.dumps({"x": entry}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * n * d)
        file.seek(-4, os.SEEK_END)
        file.write(torch.ones(1).numpy().tobytes())
    last = TokenFile(path, "x", (d,)).rows(n - 3, n)
    assert last.shape == (3, d) and last[2, -1] == 1 and last.sum() == 1


def test_activations_that_change(folder):
    """Another file in their place does no harm; other bytes in the file do."""
    path = folder / "x.safetensors"
    x = load_file(path)["x"].view(35, 8)
    file = TokenFile(path, "x", (8,))
    save_file({"x": x + 1}, folder / "new")
    os.replace(folder / "new", path)
    assert torch.equal(file.rows(30, 35), x[30:])
    file = TokenFile(path, "x", (8,))
    os.utime(path, ns=(0, 1))
    with pytest.raises(ValueError, match="x.safetensors changed while it was read"):
        file.rows(0, 1)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "key twice"])
def test_activations_that_are_no_file(kind, folder, capsys):
    path = folder / "x.safetensors"
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "link":
        path.symlink_to(path)
    else:
        path.write_bytes(duplicated(data, "x"))
    assert run(folder) == 2
    message = {"link": "must be a path", "key twice": "has a key twice"}
    assert message.get(kind, "must be a regular file, and is") in capsys.readouterr().err


def stopped(folder):
    """What a run that was stopped after two blocks leaves."""
    append = spool.Spool.append

    def stop(self, acts):
        append(self, acts)
        if self.tokens >= 18:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(spool.Spool, "append", stop)
        run(folder, "--block", "9")
    return folder / "acts.safetensors.partial"


COUNTS = '{"tokens": %s, "entries": [%s]}'


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("run.json", "{", "run.json is damaged: remove"),
        ("run.json", "[3]", "was left by another run"),
        ("done.json", "", "done.json is damaged: remove"),
        ("done.json", "[]", "done.json is damaged"),
        ("done.json", "[" * 20_000, "done.json is damaged"),
        ("done.json", '{"tokens": 9}', "done.json is damaged"),
        ("done.json", COUNTS % ('"9"', 1), "done.json is damaged"),
        ("done.json", COUNTS % (-9, 1), "done.json is damaged"),
        ("done.json", COUNTS % (9, "true"), "done.json is damaged"),
        ("done.json", COUNTS % (9, "1, 2"), "done.json is damaged"),
        ("done.json", COUNTS % (9, 1 << 61), "0.indices is shorter than"),
        ("0.offsets", "\0" * 8 * 40, ".partial is damaged: remove it"),
    ],
)
def test_a_damaged_state(name, text, message, folder, capsys):
    partial = stopped(folder)
    (partial / name).write_text(text)
    if name == "0.offsets":
        (partial / "done.json").write_text(COUNTS % (40, 0))
    assert run(folder, "--block", "9") == 2
    assert message in capsys.readouterr().err
    assert run(folder, "--block", "9", "--restart") == 0
    assert gsf.load_acts(folder / "acts.safetensors").n == 35


@pytest.mark.parametrize("name", ["run.json", "done.json", "0.offsets", "done.tmp"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_state_that_leads_elsewhere(name, kind, folder, capsys):
    """What a link leads to is neither read, cut nor written."""
    path, other = stopped(folder) / name, folder / "precious"
    other.write_bytes(b"x" * 5000)
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(other)
    else:
        os.mkfifo(path)
    assert run(folder, "--block", "9") == 2
    assert "must be no link, and no pipe" in capsys.readouterr().err
    assert other.read_bytes() == b"x" * 5000
    assert run(folder, "--block", "9", "--restart") == 0 and other.exists()


def test_a_state_that_is_a_link(folder, capsys):
    partial = stopped(folder)
    partial.rename(folder / "elsewhere")
    partial.symlink_to("elsewhere")
    assert run(folder, "--block", "9", "--restart") == 2
    assert "must be no link" in capsys.readouterr().err
    assert (folder / "elsewhere" / "run.json").exists()


def test_a_restart_beside_a_run(folder, capsys):
    """What another process works on is not removed."""
    with spool.spool(folder / "acts.safetensors", {"values": "float32"}, [None]) as state:
        assert run(folder, "--restart") == 2
        assert "is in use: another process writes" in capsys.readouterr().err
        assert (state.folder / "run.json").exists()


def test_a_run_that_was_being_removed(folder):
    """Its counts are not those of the next run, which has other tokens."""
    (stopped(folder) / "run.json").unlink()
    save_file({"x": torch.zeros(35, 8)}, folder / "x.safetensors")
    assert run(folder, "--block", "9") == 0
    expected = gsf.load(folder / "sae").encode(torch.zeros(35, 8))
    same(gsf.load_acts(folder / "acts.safetensors"), expected)
