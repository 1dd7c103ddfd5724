"""Several writers and readers of one folder, and what writers that fail or die leave behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attacks import write
from test_artefacts_saving import KILLED, failing, old_and_new, which

from gemmascope_fast import SAE, Transcoder, load
from gemmascope_fast.artefacts import files, folders

FILES = ["config.json", "params.safetensors"]


@pytest.mark.parametrize("renamed", [1, 2])
def test_a_save_within_another(renamed, tmp_path, monkeypatch):
    """The second one starts when the first has renamed one file, or both."""
    old, new = old_and_new()
    calls, other, real = [], None, os.replace

    def replace(*args):
        nonlocal other
        real(*args)
        calls.append(args)
        if len(calls) == renamed:
            other = threading.Thread(target=new.save_pretrained, args=(tmp_path,))
            other.start()
            other.join(0.3)  # whole, if nothing holds it

    monkeypatch.setattr(os, "replace", replace)
    old.save_pretrained(tmp_path)
    other.join()
    assert len(calls) == 4
    assert which(tmp_path) == "new"
    assert sorted(os.listdir(tmp_path)) == FILES


def test_four_writers_and_a_reader(tmp_path):
    """At every moment one whole artefact; and nobody's temporary file goes while it is used."""
    modules = old_and_new()
    modules[0].save_pretrained(tmp_path)
    end = time.monotonic() + 3

    def write_on(module):
        count = 0
        while time.monotonic() < end:
            module.save_pretrained(tmp_path)
            count += 1
        return count

    found = []
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write_on, modules[i % 2]) for i in range(4)]
        while time.monotonic() < end:
            found.append(which(tmp_path))
    assert sum(w.result() for w in writers) >= 8  # and none raised
    assert set(found) == {"old", "new"}
    assert which(tmp_path) in ("old", "new")
    assert sorted(os.listdir(tmp_path)) == FILES


PROCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_artefacts_saving import old_and_new
module = old_and_new()[int(sys.argv[3])]
print("ready", flush=True)
while True:
    module.save_pretrained(sys.argv[2])
"""


def test_processes_that_are_killed(tmp_path):
    """Whenever SIGKILL comes, what remains is whole, the lock is free, the next save cleans."""
    old_and_new()[0].save_pretrained(tmp_path)
    here = os.path.dirname(__file__)
    commands = [[sys.executable, "-c", PROCESS, here, str(tmp_path), str(i)] for i in range(2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE) for c in commands]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        end = time.monotonic() + 1
        while time.monotonic() < end:
            which(tmp_path)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    which(tmp_path)
    old_and_new()[1].save_pretrained(tmp_path)
    assert which(tmp_path) == "new"
    assert sorted(os.listdir(tmp_path)) == FILES


def test_a_reader_keeps_busy_writers_out_in_the_end(tmp_path, monkeypatch):
    """A save between tensors and config, at every attempt."""
    old, new = old_and_new()
    old.save_pretrained(tmp_path)
    threads, real = [], files.config_bytes

    def config_bytes(folder):
        module = (old, new)[len(threads) % 2]
        threads.append(threading.Thread(target=module.save_pretrained, args=(folder,)))
        threads[-1].start()
        threads[-1].join(1)
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "config_bytes", config_bytes)
        assert which(tmp_path) == "old"
    assert len(threads) == 4  # the last waited for the reader
    threads[-1].join()
    assert which(tmp_path) == "new"


def test_a_save_in_a_signal_handler_within_a_save(tmp_path, monkeypatch):
    """It would wait for itself for ever."""
    old, new = old_and_new()
    real, errors = os.replace, []

    def handler(*_):
        try:
            new.save_pretrained(tmp_path)
        except RuntimeError as error:
            errors.append(str(error))

    def replace(*args):
        monkeypatch.setattr(os, "replace", real)
        signal.raise_signal(signal.SIGUSR1)
        real(*args)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(os, "replace", replace)
        old.save_pretrained(tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(errors) == 1
    assert "save_pretrained: this thread is in the middle of saving to" in errors[0]
    assert which(tmp_path) == "old"
    new.save_pretrained(tmp_path)
    assert which(tmp_path) == "new"


# what is left behind


def broken():
    module = SAE(6, 10)
    with torch.no_grad():
        module.b_enc[3] = float("nan")
    return module


@pytest.mark.parametrize("path", ["a1/b1/c1", "keep/b1/c1", "x/../a1/c1"])
def test_a_failed_save_removes_the_folders_it_made(path, tmp_path):
    (tmp_path / "keep").mkdir()
    with pytest.raises(ValueError, match="b_enc must be finite"):
        broken().save_pretrained(tmp_path / path)
    assert os.listdir(tmp_path) == ["keep"] and os.listdir(tmp_path / "keep") == []
    with pytest.raises(ValueError, match="b_enc must be finite"):
        broken().save_pretrained(tmp_path / "keep")
    assert os.listdir(tmp_path) == ["keep"]  # nor one that it found empty


def test_a_failed_save_leaves_folders_that_others_use(tmp_path, monkeypatch):
    real = folders.remove_temporaries

    def others(folder):
        write(folder.parent / "theirs", b"")
        real(folder)

    monkeypatch.setattr(folders, "remove_temporaries", others)
    with pytest.raises(ValueError, match="b_enc must be finite"):
        broken().save_pretrained(tmp_path / "a" / "b" / "c")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "a/b") == ["theirs"]


def test_writers_that_fail_beside_one_that_does_not(tmp_path):
    """They remove the folder again and again; the good one makes it or finds it."""
    new, stop = old_and_new()[1], threading.Event()

    def fail_on():
        while not stop.is_set():
            with pytest.raises(ValueError, match="b_enc must be finite"):
                broken().save_pretrained(tmp_path / "a" / "b")

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(fail_on) for _ in range(2)]
        try:
            for _ in range(30):
                new.save_pretrained(tmp_path / "a" / "b")
                assert which(tmp_path / "a" / "b") == "new"
                for name in FILES:
                    os.unlink(tmp_path / "a" / "b" / name)
        finally:
            stop.set()
    for future in running:
        future.result()


def test_the_next_save_removes_temporary_files_of_killed_ones(tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", KILLED, here, str(tmp_path), "replace", "0"]
    assert subprocess.run(command).returncode == 9
    left = os.listdir(tmp_path)
    assert len(left) == 2 and all(name.endswith(".tmp") for name in left)
    mine = [".config.json.tmp", ".params.safetensors.0123.tmp", "x.params.safetensors.0.tmp"]
    for name in mine:
        write(tmp_path / name, b"")
    folder = f".config.json.{'0' * 16}.tmp"
    (tmp_path / folder).mkdir()
    old_and_new()[1].save_pretrained(tmp_path)
    assert which(tmp_path) == "new"
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, *mine, folder])


# what is refused before anything is written


def test_a_path_that_is_not_utf8(tmp_path):
    bad = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"save_pretrained: the path must be valid UTF-8.*udce9"):
        SAE(6, 10).save_pretrained(bad)
    assert os.listdir(tmp_path) == []
    SAE(6, 10).save_pretrained(tmp_path / "f")
    (tmp_path / "f").rename(bad)
    for source in (bad, bad / "params.safetensors"):
        with pytest.raises(ValueError, match=r"^load: the path must be valid UTF-8.*udce9") as got:
            load(source)
        str(got.value).encode()  # it can be printed
    SAE(6, 10).save_pretrained(tmp_path / "café")
    assert load(tmp_path / "café").d_sae == 10


def test_a_skip_in_an_sae(tmp_path):
    module = SAE(6, 10)
    module.W_skip = torch.nn.Parameter(torch.zeros(6, 6))
    with pytest.raises(ValueError, match="save_pretrained: W_skip must be None in a SAE"):
        module.save_pretrained(tmp_path / "f")
    assert os.listdir(tmp_path) == []
    module.W_skip = None
    module.save_pretrained(tmp_path / "f")
    assert type(load(tmp_path / "f")) is SAE
    Transcoder(6, 10, affine=True).save_pretrained(tmp_path / "f")
    assert load(tmp_path / "f").W_skip.shape == (6, 6)


@pytest.mark.parametrize("metadata", [[1], None, "text"])
def test_metadata_that_is_no_dict(metadata, tmp_path):
    module = SAE(6, 10)
    module.metadata = metadata
    kind = type(metadata).__name__
    with pytest.raises(TypeError, match=f"module.metadata must be a dict, got {kind}"):
        module.save_pretrained(tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "link").symlink_to("absent")
    for path in ("link", "link/below"):
        with pytest.raises(ValueError, match="link is a link that leads nowhere"):
            SAE(6, 10).save_pretrained(tmp_path / path)
    with pytest.raises(ValueError, match="path must be a path, got a string with a NUL"):
        SAE(6, 10).save_pretrained("a\0b")
    assert os.listdir(tmp_path) == ["link"]


def test_a_failure_to_lock(tmp_path, monkeypatch):
    """Nothing is written without the lock, and nothing stays."""
    monkeypatch.setattr(folders.fcntl, "flock", failing(None, 0, OSError(37, "No locks")))
    with pytest.raises(OSError, match="No locks"):
        SAE(6, 10).save_pretrained(tmp_path / "f")
    assert os.listdir(tmp_path) == []
