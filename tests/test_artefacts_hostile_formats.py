"""Untrusted files of the other formats: SAELens, sparsify, sparse activations."""

import os
import tracemalloc

import pytest
import torch
from attacks import acts, peers, write

import gemmascope_fast as gsf


def refused(read, path, message, op="load"):
    """`read` refuses by one short error, before it allocates what is declared."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError and peak < 16 << 20
    assert str(caught.value).startswith(f"{op}: ") and len(str(caught.value)) < 600


@pytest.mark.parametrize("case", peers.CASES, ids="-".join)
def test_attack_on_a_peer(case, tmp_path):
    peers.make(case, tmp_path)
    refused(gsf.load, tmp_path, peers.CASES[case][2])


@pytest.mark.parametrize("peer", peers.VALID)
def test_the_attacked_peers_are_valid_otherwise(peer, tmp_path):
    write(tmp_path / peers.WEIGHTS[peer], peers.VALID[peer])
    write(tmp_path / "cfg.json", peers._config(peer, l0=20, latents=[3, 13]))
    module = gsf.load(tmp_path, latents=slice(2, 5))
    assert torch.equal(module.W_enc, torch.from_numpy(peers.ARRAYS["w_enc"][:, 2:5]))
    assert module.metadata["latents"] == [5, 8]


@pytest.mark.parametrize("version, old", [("5.10.7", True), ("6.0.0", False), ("10.1", False)])
def test_versions_of_saelens_are_numbers(version, old, tmp_path):
    """Before 6 the activation had a field of its own; 10 is not before 6."""
    config = {"activation_fn": "tanh-relu", "metadata": {"sae_lens_version": version}}
    write(tmp_path / peers.WEIGHTS["saelens"], peers.VALID["saelens"])
    write(tmp_path / "cfg.json", peers._config("saelens", **config))
    if old:
        refused(gsf.load, tmp_path, "activation_fn must be relu or topk")
    else:
        assert gsf.load(tmp_path).d_sae == 10


# sparse activations


@pytest.mark.parametrize("name", acts.CASES)
def test_attack_on_activations(name, tmp_path):
    acts.make(name, tmp_path / "f")
    refused(gsf.load_acts, tmp_path / "f", acts.CASES[name][1], "load_acts")


def test_the_attacked_activations_are_valid_otherwise(tmp_path):
    write(tmp_path / "f", acts.VALID)
    found = gsf.load_acts(tmp_path / "f")
    expected = torch.zeros(2, 10)
    expected[0, 1], expected[0, 4], expected[1, 0] = 1, 2, 3
    assert torch.equal(found.to_dense(), expected)
    write(tmp_path / "g", acts.empty(0, 4, 10))
    assert gsf.load_acts(tmp_path / "g").to_dense().shape == (0, 4, 10)


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "device", "long"])
def test_activations_are_a_regular_file(kind, tmp_path):
    """Opening a pipe would wait for ever."""
    path = tmp_path / ("x" * 300 if kind == "long" else "f")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "long":
        path.symlink_to({"loop": path, "device": "/dev/zero"}[kind])
    message = {"loop": "must be a path", "long": "must be a path: File name too long"}
    refused(gsf.load_acts, path, message.get(kind, "must be a regular file, and is"), "load_acts")
